"""Ranks trade tokens for heads and back: every number lands where it belongs."""

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from xattn_video.processors.head_exchange import HeadExchange

# Video and text tokens, heads, numbers of a head, dtype, order of the heads.
DEALT = [7, 0, 5, 2, 3, 6, 1, 4]
SIZES = {
    "even": (40, 6, 8, 8, torch.float32, None),
    "uneven": (43, 6, 8, 8, torch.bfloat16, DEALT),
    "HunyuanVideo-1.5": (49_290, 256, 16, 1, torch.bfloat16, None),
    "odd heads": (43, 5, 8, 3, torch.bfloat16, DEALT),
    "no text": (9, 0, 4, 4, torch.float32, [3, 1, 0, 2]),
}
BATCH = 2


def exchange_of(group, rank, num_ranks, video, text, heads, order=None):
    exchange = HeadExchange(group, rank, num_ranks, heads, video, text)
    return exchange.ordered(None if order is None else torch.tensor(order))


def trade_all() -> dict[str, bool]:
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    found = {}
    for name, (video, text, heads, dim, dtype, order) in SIZES.items():
        exchange = exchange_of(dist.group.WORLD, rank, num_ranks, video, text, heads, order)
        places = torch.tensor(order or range(heads))[exchange.places(rank)]
        begin = sum(exchange.rows[:rank])
        rows = slice(begin, begin + exchange.rows[rank])
        generator = torch.Generator().manual_seed(1)
        for number in ("first", "second"):
            whole = torch.randn(BATCH, video + text, heads, dim, generator=generator).to(dtype)
            own = torch.cat([whole[:, :video][:, rows], whole[:, video:]], 1)
            # Three tensors travel at a time: each must arrive in its own place.
            got = exchange.to_heads(own, own + 1, own * 2)
            expected = [whole[:, :, places], (whole + 1)[:, :, places], (whole * 2)[:, :, places]]
            found[f"{name}, {number}"] = all(map(torch.equal, got, expected))
            found[f"{name}, {number}, back"] = torch.equal(exchange.to_tokens(got[0]), own)
    return found


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_every_number_lands_where_it_belongs(num_ranks, tmp_path):
    for rank in run_ranks(trade_all, num_ranks, tmp_path):
        assert all(rank.values()), rank


@pytest.mark.parametrize("video", [118_800, 49_290])
@pytest.mark.parametrize("num_ranks", [2, 3, 4, 6, 8])
def test_rows_are_split_as_diffusers_splits_them(video, num_ranks):
    rows = exchange_of(None, 0, num_ranks, video, 256, 24).rows
    assert rows == [len(part) for part in torch.arange(video).tensor_split(num_ranks)]


@pytest.mark.parametrize("rank", range(4))
def test_nothing_waits_for_the_device(rank):
    """Fake tensors have no numbers: none can be read, and no size can depend on one."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=4)
    try:
        with FakeTensorMode():
            exchange = HeadExchange(dist.group.WORLD, rank, 4, 24, 118_801, 256)
            exchange = exchange.ordered(torch.empty(24, dtype=torch.long))
            own = exchange.rows[rank] + 256
            tokens = torch.empty(1, own, 24, 128, dtype=torch.bfloat16)
            (heads,) = exchange.to_heads(tokens)
            assert heads.shape == (1, 118_801 + 256, 6, 128)
            assert exchange.to_tokens(heads).shape == tokens.shape
            counts = exchange.count_heads(torch.empty(6, dtype=torch.long))
            assert exchange.balanced_order(counts).shape == exchange.order.shape
            assert exchange.imbalance(counts).shape == ()
            with pytest.raises(DataDependentOutputException):
                counts[0].item()
    finally:
        dist.destroy_process_group()
