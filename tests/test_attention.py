from functools import partial

import pytest
import torch
import torch.nn.functional as F
from oracle import assert_within_budget, masked_attention
from torch.utils._python_dispatch import TorchDispatchMode

from xattn_video import (
    BackendUnavailableError,
    attend,
    available_backends,
    block_scores,
    block_sparse_attention,
    select,
    select_blocks,
    xattention,
)
from xattn_video.backends import torch_gather
from xattn_video.backends.table import BACKENDS
from xattn_video.ops.blocks import BlockLists
from xattn_video.ops.problem import AttentionInputs
from xattn_video.ops.scoring import ScoringInputs, torch_block_scores


def make_inputs(B, H, Sq, Sk, D, dtype=torch.float32):
    shapes = [(B, H, Sq, D), (B, H, Sk, D), (B, H, Sk, D)]
    return [torch.randn(shape, dtype=dtype) for shape in shapes]


def random_mask(B, H, Sq, Sk, block_size, density=0.5):
    mask = torch.rand(B, H, -(-Sq // block_size), -(-Sk // block_size)) < density
    mask[..., 0] = True
    return mask


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("B", "H", "Sq", "Sk", "D", "block_size", "causal", "lengths"),
    [
        (1, 1, 64, 64, 64, 64, False, None),
        (1, 2, 129, 129, 128, 128, False, None),
        (2, 1, 127, 127, 64, 64, True, None),
        (1, 1, 997, 997, 48, 128, True, None),
        (1, 2, 200, 453, 64, 64, True, None),
        (1, 2, 453, 200, 16, 64, False, None),
        (2, 2, 300, 300, 64, 64, False, [300, 131]),
        (2, 1, 300, 300, 64, 64, True, [299, 1]),
    ],
)
def test_gathered_attention_is_the_formula(
    B, H, Sq, Sk, D, block_size, causal, lengths, dtype, poisoned_memory
):
    inputs = make_inputs(B, H, Sq, Sk, D, dtype)
    mask = random_mask(B, H, Sq, Sk, block_size)
    key_lengths = None if lengths is None else torch.tensor(lengths)
    options = {"block_size": block_size, "causal": causal, "key_lengths": key_lengths}
    out = block_sparse_attention(*inputs, mask, **options, backend="torch_gather")
    expected = masked_attention(*inputs, mask, **options)
    same_dtype = masked_attention(*inputs, mask, **options, dtype=dtype)
    assert out.dtype == dtype
    assert_within_budget(out, expected, same_dtype)


def test_a_query_without_a_key_gets_zero():
    query, key, value = make_inputs(1, 1, 128, 128, 16)
    mask = torch.tensor([[False, False], [True, True]])[None, None]
    out = block_sparse_attention(query, key, value, mask, block_size=64)
    assert (out[:, :, :64] == 0).all()
    assert out[:, :, 64:].abs().min() > 0


def test_one_mask_serves_every_item_and_head():
    inputs = make_inputs(2, 3, 128, 128, 16)
    mask = random_mask(1, 1, 128, 128, 64)
    out = block_sparse_attention(*inputs, mask, block_size=64)
    expanded = block_sparse_attention(*inputs, mask.expand(2, 3, -1, -1), block_size=64)
    assert torch.equal(out, expanded)


def test_the_output_is_laid_out_for_diffusers():
    inputs = [tensor.transpose(1, 2) for tensor in torch.randn(3, 1, 256, 2, 32)]
    out = xattention(*inputs, block_size=64)
    assert out.shape == (1, 2, 256, 32)
    assert out.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("causal", [False, True])
def test_threshold_one_is_dense_attention(causal):
    query, key, value = make_inputs(1, 2, 300, 300, 64)
    out = xattention(query, key, value, threshold=1.0, causal=causal)
    dense = F.scaled_dot_product_attention(query, key, value, is_causal=causal)
    expected = F.scaled_dot_product_attention(
        query.double(), key.double(), value.double(), is_causal=causal
    )
    assert_within_budget(out, expected, dense)


def test_xattention_computes_the_selected_blocks():
    query, key, value = make_inputs(1, 2, 640, 640, 32)
    out, mask = xattention(
        query * 4, key, value, threshold=0.6, stride=4, block_size=64, return_block_mask=True
    )
    scores = block_scores(query * 4, key, stride=4, block_size=64)
    assert torch.equal(mask, select_blocks(scores, 0.6))
    assert 0.1 < mask.float().mean() < 0.9
    assert torch.equal(out, block_sparse_attention(query * 4, key, value, mask, block_size=64))


def test_select_and_attend_are_the_two_halves():
    query, key, value = make_inputs(2, 2, 320, 320, 32)
    shared = {"block_size": 64, "key_lengths": [250, 320]}
    options = {**shared, "threshold": 0.6, "stride": 4, "num_text_tokens": 90}
    expected, mask = xattention(query * 4, key, value, **options, return_block_mask=True)
    blocks = select(query * 4, key, **options)
    assert torch.equal(blocks.to_mask(), mask)
    assert torch.equal(attend(query * 4, key, value, blocks, **shared), expected)


def test_blocks_of_another_shape_are_refused():
    query, key, value = make_inputs(1, 2, 320, 320, 32)
    blocks = select(query, key, block_size=128)
    with pytest.raises(ValueError, match=r"\[B, H, Nq\] = \[1, 2, 5\].*got \[1, 2, 3\]"):
        attend(query, key, value, blocks, block_size=64)


def test_the_scoring_precision_reaches_the_scores():
    with pytest.raises(ValueError, match="or \"float8\", got 'half'"):
        xattention(*make_inputs(1, 1, 128, 128, 16), scoring_precision="half")


def test_text_is_always_computed():
    """90 text tokens after 230 video tokens, of which 40 and 0 are valid, in blocks of 64."""
    query, key, value = make_inputs(2, 1, 320, 320, 32)
    lengths = torch.tensor([270, 230])
    options = {"block_size": 64, "num_text_tokens": 90, "key_lengths": lengths}
    _, mask = xattention(query * 8, key, value, threshold=0.05, **options, return_block_mask=True)
    first, second = mask[:, 0]
    assert first[:, 3:].all(dim=0).tolist() == [True, True]
    assert first[3:].all()
    assert not first[:3, :3].all()
    assert not second[:, 4].any()
    assert second.sum() == 5


def test_padded_text_is_never_a_key():
    query, key, value = make_inputs(1, 1, 320, 320, 32)
    options = {"block_size": 64, "num_text_tokens": 90, "key_lengths": torch.tensor([250])}
    expected = xattention(query, key, value, **options)
    key[:, :, 250:] = 1e4
    value[:, :, 250:] = torch.nan
    out = xattention(query, key, value, **options)
    assert torch.equal(out[:, :, :250], expected[:, :, :250])
    assert out.isfinite().all()


def test_cut_keys_give_what_key_lengths_give():
    query, key, value = make_inputs(1, 2, 320, 320, 32)
    whole = xattention(
        query, key, value, block_size=64, num_text_tokens=90, key_lengths=torch.tensor([250])
    )
    cut = xattention(query, key[:, :, :250], value[:, :, :250], block_size=64, num_text_tokens=20)
    torch.testing.assert_close(cut[:, :, :250], whole[:, :, :250])


def test_memory_is_far_below_the_square_of_the_tokens():
    """Of the torch path: neither the tokens' matrix nor that of all groups is ever whole."""
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, tuple | list) else (out,):
                # A view may be expanded; what it is stored in counts.
                if isinstance(tensor, torch.Tensor):
                    largest = max(largest, tensor.untyped_storage().nbytes())
            return out

    length, stride, block_size = 16384, 8, 128
    query, key, value = make_inputs(1, 1, length, length, 16)
    blocks = BlockLists.from_mask(random_mask(1, 1, length, length, block_size, density=0.1))
    options = {"block_size": block_size, "causal": False, "key_lengths": None, "scale": 0.25}
    with Watch():
        torch_block_scores(ScoringInputs(query, key, stride=stride, **options))
        torch_gather.forward(AttentionInputs(query, key, value, blocks, **options))
    groups_in_bytes = 4 * (length // stride) ** 2
    assert 0 < largest <= groups_in_bytes // 4


def test_nan_propagates_as_in_dense_attention():
    query, key, value = make_inputs(1, 1, 256, 256, 16)
    query[0, 0, 70, 3] = torch.nan
    out = xattention(query * 4, key, value, threshold=0.3, block_size=64)
    dense = F.scaled_dot_product_attention(query * 4, key, value)
    assert torch.equal(out.isnan(), dense.isnan())
    key[0, 0, 5] = torch.nan
    assert xattention(query, key, value, threshold=0.3, block_size=64).isnan().all()


@pytest.mark.parametrize("bad", [torch.inf, -torch.inf])
def test_infinity_propagates_as_in_dense_attention(bad):
    query, key, value = make_inputs(1, 1, 256, 256, 16)
    # An infinite query reaches its row of blocks, which is dense then.
    broken = query.clone()
    broken[0, 0, 70, 3] = bad
    out, mask = xattention(
        broken * 4, key, value, threshold=0.3, block_size=64, return_block_mask=True
    )
    dense = F.scaled_dot_product_attention(broken * 4, key, value)
    assert mask.sum(-1).flatten().eq(4).tolist() == [False, True, False, False]
    torch.testing.assert_close(out[:, :, 64:128], dense[:, :, 64:128], equal_nan=True)
    assert out.isnan().flatten(0, 2).any(-1).nonzero().tolist() == [[70]]
    # An infinite key hides itself from some queries and breaks the others.
    broken = key.clone()
    broken[0, 0, 5, 3] = bad
    out = xattention(query, broken, value, threshold=1.0, block_size=64)
    dense = F.scaled_dot_product_attention(query, broken, value)
    assert 0.1 < dense.isnan().float().mean() < 0.9
    torch.testing.assert_close(out, dense, equal_nan=True)


def test_compiled_calls_keep_one_graph():
    query, key, value = make_inputs(1, 2, 256, 256, 16)

    def attend(query, key, value, threshold):
        return xattention(query, key, value, threshold=threshold, block_size=64) * 2

    compiled = torch.compile(attend, backend="aot_eager", fullgraph=True)
    for tau in (0.5, 0.9):
        threshold = torch.tensor(tau)
        torch.testing.assert_close(
            compiled(query, key, value, threshold), attend(query, key, value, threshold)
        )


def test_the_operators_are_sound_custom_ops():
    query, key, value = make_inputs(1, 2, 256, 256, 16)
    blocks = BlockLists.from_mask(random_mask(1, 2, 256, 256, 64))
    lengths = torch.tensor([200])
    ops = torch.ops.xattn_video
    for return_lse in (False, True):
        tensors = query, key, value, blocks.counts, blocks.indices, lengths.int()
        torch.library.opcheck(
            ops.attend.default, (*tensors, 64, False, 0.25, "torch_gather", return_lse)
        )
    torch.library.opcheck(
        ops.select.default,
        (query, key, torch.tensor(0.9), None, 8, 64, False, 0, 0.25, "exact"),
    )
    torch.library.opcheck(ops.key_lengths.default, (lengths, 256, query.device))
    torch.library.opcheck(ops.threshold.default, (torch.tensor([[0.5], [0.9]]), query.device))


def test_gradients_are_refused():
    query, key, value = make_inputs(1, 1, 128, 128, 16)
    query.requires_grad_()
    mask = random_mask(1, 1, 128, 128, 128)
    for call in (xattention, partial(block_sparse_attention, block_mask=mask)):
        with pytest.raises(ValueError, match=r"has no gradient; run under torch.no_grad\(\)"):
            call(query, key, value)
        with torch.no_grad():
            call(query, key, value)


def test_an_unknown_backend_is_refused_with_the_known_ones():
    inputs = make_inputs(1, 1, 128, 128, 16)
    with pytest.raises(ValueError, match=r"'cutlass'; expected one of auto, .*torch_gather"):
        xattention(*inputs, backend="cutlass")


def test_auto_says_what_it_chose_once(caplog):
    inputs = make_inputs(1, 1, 128, 128, 24)
    with caplog.at_level("INFO", logger="xattn_video.backends.table"):
        xattention(*inputs)
        xattention(*inputs)
    assert len(caplog.records) == 1
    assert "'torch_gather' chosen" in caplog.text


def test_a_named_backend_never_falls_back(monkeypatch):
    monkeypatch.setattr(torch_gather, "unsupported_reasons", lambda problem: ["no.", "never."])
    with pytest.raises(BackendUnavailableError, match=r"(?s)'torch_gather'.*- no\..*- never\."):
        block_sparse_attention(
            *make_inputs(1, 1, 64, 64, 16),
            random_mask(1, 1, 64, 64, 64),
            block_size=64,
            backend="torch_gather",
        )


@pytest.mark.parametrize("backend", ["triton", "flash4"])
def test_a_head_size_that_a_named_backend_lacks_is_refused(backend):
    inputs = make_inputs(1, 1, 128, 128, 20)
    mask = random_mask(1, 1, 128, 128, 128)
    for call in (xattention, partial(block_sparse_attention, block_mask=mask)):
        with pytest.raises(BackendUnavailableError, match=rf"'{backend}'(?s:.*)head_dim must"):
            call(*inputs, backend=backend)


def test_available_backends_lists_all_of_them():
    reasons = available_backends("cpu")
    assert list(reasons) == list(BACKENDS)
    assert reasons["torch_gather"] == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"block_mask": torch.ones(1, 1, 2, 2)}, "block_mask must be a bool tensor"),
        (
            {"block_mask": torch.ones(1, 1, 2, 3, dtype=torch.bool)},
            r"\[B, H, Nq, Nk\] = \[1, 1, 2, 2\].*got \[1, 1, 2, 3\]",
        ),
        (
            {"block_mask": torch.ones(1, 1, 2, 2, dtype=torch.bool, device="meta")},
            r"block_mask must be .*got \[1, 1, 2, 2\] on the meta device",
        ),
        (
            {"key_lengths": torch.ones(1, dtype=torch.int32, device="meta")},
            r"key_lengths must be .*got \[1\] on the meta device",
        ),
        ({"value": torch.randn(1, 1, 100, 16)}, "key and value must have the same shape"),
        ({"block_size": 0}, "block_size must be at least 1 token, got 0"),
        ({"value": torch.randn(1, 1, 128, 16).half()}, "share one dtype, got query torch.float32"),
        ({"key_lengths": [129]}, r"between 1 and Sk=128, got \[129\]"),
        ({"key_lengths": [0]}, r"between 1 and Sk=128, got \[0\]"),
    ],
)
def test_bad_arguments_are_refused(change, message):
    query, key, value = make_inputs(1, 1, 128, 128, 16)
    arguments = {
        "query": query,
        "key": key,
        "value": value,
        "block_mask": torch.ones(1, 1, 2, 2, dtype=torch.bool),
        "block_size": 64,
    }
    with pytest.raises((ValueError, TypeError), match=message):
        block_sparse_attention(**(arguments | change))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threshold": 0.0}, r"threshold must lie in \(0, 1\], got 0.0"),
        ({"threshold": 1.5}, r"threshold must lie in \(0, 1\], got 1.5"),
        ({"stride": 7}, "stride must divide block_size, got stride=7"),
        (
            {"threshold": torch.ones((), device="meta")},
            r"threshold must be .*got \[\] on the meta device",
        ),
        (
            {"key_lengths": torch.ones(1, dtype=torch.int32, device="meta")},
            r"key_lengths must be .*got \[1\] on the meta device",
        ),
        ({"num_text_tokens": 128}, "between 0 and Sk - 1 = 127, got 128"),
        ({"num_text_tokens": 8, "causal": True}, "joint text-video attention is not causal"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        xattention(*make_inputs(1, 1, 128, 128, 16), **options)


@pytest.mark.parametrize("threshold", [[0.9], "0.9", None, True])
def test_a_threshold_that_is_no_number_is_refused(threshold):
    inputs = make_inputs(1, 1, 128, 128, 16)
    with pytest.raises(TypeError, match=r"threshold must be a number in \(0, 1\] or a tensor"):
        xattention(*inputs, threshold=threshold)
    with pytest.raises(TypeError, match=r"threshold must be a number in \(0, 1\] or a tensor"):
        select_blocks(block_scores(*inputs[:2]), threshold)


@pytest.mark.parametrize(
    "options", [{"stride": 8.0}, {"stride": "8"}, {"block_size": 128.0}, {"block_size": True}]
)
def test_sizes_that_are_no_integers_are_refused(options):
    ((name, size),) = options.items()
    with pytest.raises(
        TypeError, match=f"{name} must be an integer number of tokens, got {size!r}"
    ):
        xattention(*make_inputs(1, 1, 128, 128, 16), **options)


def test_text_needs_a_query_for_every_key():
    query, key, value = make_inputs(1, 1, 100, 128, 16)
    with pytest.raises(ValueError, match=r"a query for every key, got causal=False, Sq=100"):
        xattention(query, key, value, num_text_tokens=8)


def test_a_block_may_have_any_number_of_tokens():
    query, key, value = make_inputs(1, 1, 20, 20, 16)
    out = block_sparse_attention(
        query, key, value, torch.ones(1, 1, 3, 3, dtype=torch.bool), block_size=7
    )
    torch.testing.assert_close(out, F.scaled_dot_product_attention(query, key, value))
