import pytest
import torch
from oracle import assert_smallest_set

pytest.importorskip("triton")

from xattn_video import select_blocks
from xattn_video.kernels import block_selection as kernel
from xattn_video.ops import blocks
from xattn_video.ops.blocks import BlockLists, ForcedBlocks, fewest_blocks, kernel_block_lists

BLOCK_SIZE = 64


def random_scores(B, H, Nq, Nk, device, sharpness=3.0):
    return (torch.randn(B, H, Nq, Nk, device=device) * sharpness).softmax(-1)


def exact_scores(B, H, Nq, Nk, device, levels=4):
    """Scores whose sums float32 holds exactly, with many ties."""
    return torch.randint(1, levels + 1, (B, H, Nq, Nk), device=device) / 4096


def select(scores, threshold, forced=None, by_count=False):
    """The lists that the kernel makes; without `forced` nothing is."""
    if forced is None:
        forced = ForcedBlocks(
            scores.shape[2] * BLOCK_SIZE, scores.shape[3] * BLOCK_SIZE, BLOCK_SIZE
        )
    threshold = torch.as_tensor(threshold, device=scores.device)
    return kernel_block_lists(scores, threshold, forced, by_count)


def assert_same_lists(actual, mask):
    expected = BlockLists.from_mask(mask)
    assert actual.counts.dtype == actual.indices.dtype == torch.int32
    assert torch.equal(actual.counts, expected.counts)
    assert torch.equal(actual.indices, expected.indices)


@pytest.mark.parametrize("threshold", [0.3, 0.9, 1.0])
@pytest.mark.parametrize("Nk", [1, 2, 33, 130])
def test_ties_are_broken_as_a_stable_sort_does(Nk, threshold, device):
    scores = exact_scores(1, 1, 2, Nk, device)
    assert_same_lists(select(scores, threshold), select_blocks(scores, threshold))


@pytest.mark.parametrize("sharpness", [0.0, 3.0, 20.0])
@pytest.mark.parametrize("threshold", [0.01, 0.95])
def test_the_kept_set_is_the_smallest(threshold, sharpness, device):
    scores = random_scores(1, 1, 2, 97, device, sharpness)
    mask = select(scores, threshold).to_mask()
    for row, kept in zip(scores.flatten(0, 2), mask.flatten(0, 2), strict=True):
        assert_smallest_set(row, kept, threshold)


def test_lists_and_mask_are_one_choice(device):
    scores = exact_scores(2, 1, 2, 50, device)
    assert torch.equal(select(scores, 0.6).to_mask(), select_blocks(scores, 0.6))


def test_a_threshold_per_head_and_per_row(device):
    scores = exact_scores(1, 2, 3, 40, device)
    per_head = torch.tensor([[0.3], [1.0]], device=device)
    per_row = torch.tensor([0.2, 0.6, 0.9], device=device)
    for threshold in (per_head, per_row):
        assert_same_lists(select(scores, threshold), select_blocks(scores, threshold))


@pytest.mark.parametrize("lengths", [None, [200, 131], [130, 193]])
@pytest.mark.parametrize(("Sq", "Sk", "num_text_tokens"), [(200, 200, 70), (250, 200, 1)])
def test_text_is_forced(Sq, Sk, num_text_tokens, lengths, device):
    if lengths is not None:
        lengths = torch.tensor(lengths, dtype=torch.int32, device=device)
    forced = ForcedBlocks(Sq, Sk, BLOCK_SIZE, False, num_text_tokens, lengths)
    scores = exact_scores(2, 1, -(-Sq // BLOCK_SIZE), -(-Sk // BLOCK_SIZE), device)
    if lengths is not None:
        for item, length in enumerate(lengths.tolist()):
            scores[item, :, :, -(-length // BLOCK_SIZE) :] = 0
    expected = select_blocks(scores, 0.3, forced=forced.to_mask(device))
    assert_same_lists(select(scores, 0.3, forced), expected)


def unseen_blocks(Sq, Sk, device):
    """Blocks of which a row's last query sees no key, `[Nq, Nk]`."""
    last_query = torch.arange(1, -(-Sq // BLOCK_SIZE) + 1, device=device) * BLOCK_SIZE
    last_key = last_query.clamp(max=Sq) - 1 + Sk - Sq
    return torch.arange(-(-Sk // BLOCK_SIZE), device=device) * BLOCK_SIZE > last_key[:, None]


@pytest.mark.parametrize("by_count", [False, True])
@pytest.mark.parametrize(("Sq", "Sk"), [(320, 320), (100, 333), (640, 1000), (1000, 1000)])
def test_causal_attention_forces_the_diagonal_and_key_block_0(
    Sq, Sk, by_count, monkeypatch, device
):
    """What lies above the diagonal is not even read."""
    monkeypatch.setattr(kernel, "_FEWEST_COLUMNS", 4)
    forced = ForcedBlocks(Sq, Sk, BLOCK_SIZE, causal=True)
    scores = exact_scores(1, 2, -(-Sq // BLOCK_SIZE), -(-Sk // BLOCK_SIZE), device)
    unseen = unseen_blocks(Sq, Sk, device)
    expected = fewest_blocks(
        scores.masked_fill(unseen, 0),
        torch.tensor(0.4, device=device),
        forced.to_mask(device).expand_as(scores),
        by_count,
    )
    scores.masked_fill_(unseen, torch.nan)
    assert_same_lists(select(scores, 0.4, forced, by_count), expected)


@pytest.mark.parametrize(
    ("Nq", "Nk", "before"), [(40, 40, -1), (7, 40, 32), (3, 5, 5), (1, 1, -1)]
)
def test_rows_are_grouped_by_what_they_see(Nq, Nk, before, monkeypatch):
    monkeypatch.setattr(kernel, "_FEWEST_COLUMNS", 4)
    rows = []
    for first, number, columns in kernel._row_groups(Nq, Nk, before):
        rows += [*range(first, first + number)]
        assert columns >= min(before + first + number + 1, Nk)
        assert columns < max(2 * (before + first + 2), 5)
    assert rows == [*range(Nq)]


def test_forced_mass_counts(device):
    scores = torch.tensor([0.05, 0.3, 0.15, 0.5], device=device).expand(1, 1, 1, 4)
    # The only row holds video alone, so that its last block is all that is forced.
    forced = ForcedBlocks(BLOCK_SIZE, 4 * BLOCK_SIZE, BLOCK_SIZE, num_text_tokens=1)
    assert select(scores, 0.49, forced).to_mask().tolist() == [[[[False, False, False, True]]]]
    assert select(scores, 0.51, forced).to_mask().tolist() == [[[[False, True, False, True]]]]


def test_a_row_without_a_valid_block_is_empty(device):
    scores = exact_scores(1, 1, 3, 20, device)
    scores[0, 0, 1] = 0
    for threshold in (0.5, 1.0):
        lists = select(scores, threshold)
        assert lists.counts[0, 0, 1] == 0
        assert_same_lists(lists, select_blocks(scores, threshold))


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_row_that_is_not_finite_keeps_every_valid_block(bad, device):
    scores = exact_scores(1, 1, 3, 20, device)
    scores[..., 17:] = 0
    scores[0, 0, 1, 5] = bad
    lists = select(scores, 0.2)
    assert lists.indices[0, 0, 1].tolist() == list(range(20))
    assert_same_lists(lists, select_blocks(scores, 0.2))


@pytest.mark.parametrize(
    ("threshold", "count"), [(0.0, 1), (-1.0, 1), (1e-45, 1), (2.0, 20), (torch.nan, 20)]
)
def test_a_threshold_out_of_range_leaves_no_row_empty(threshold, count, device):
    """On a GPU nobody looks at a tensor's values."""
    scores = exact_scores(1, 1, 3, 20, device)
    scores[0, 0, 0, [7, 11]] = 0.5
    scores[0, 0, 1] = 0
    lists = select(scores, threshold)
    assert lists.counts.tolist() == [[[count, 0, count]]]
    assert lists.indices[0, 0, 0, 0] == (7 if count == 1 else 0)
    unforced = torch.zeros_like(scores, dtype=torch.bool)
    in_torch = fewest_blocks(scores, torch.as_tensor(threshold, device=device), unforced)
    assert_same_lists(lists, in_torch)


def test_threshold_one_keeps_what_hardly_scores(device):
    scores = torch.full((1, 1, 1, 9), torch.finfo(torch.float32).tiny, device=device)
    scores[..., 4] = 1
    scores[..., 8] = 0
    assert select(scores, 1.0).counts.item() == 8
    assert select(scores, 0.999).counts.item() == 1


def test_scores_of_any_layout(device):
    scores = exact_scores(1, 1, 2, 20, device).transpose(2, 3).contiguous().transpose(2, 3)
    assert_same_lists(select(scores, 0.5), select_blocks(scores, 0.5))


@pytest.mark.parametrize(("Nk", "expected"), [(8192, ["kernel"]), (8193, [])])
def test_rows_that_the_kernel_cannot_hold_are_sorted(Nk, expected, monkeypatch):
    """8,193 blocks of 128 are the keys beyond 1,048,576 tokens."""
    called = []

    def call(scores, *_, **__):
        called.append("kernel")
        lists = BlockLists.from_mask(torch.ones_like(scores, dtype=torch.bool))
        return lists.counts, lists.indices

    # As on a GPU that Triton compiles for.
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    monkeypatch.setattr(blocks, "device_unsupported_reasons", lambda device: [])
    monkeypatch.setattr(kernel, "block_selection", call)
    scores = exact_scores(1, 1, 1, Nk, torch.device("cpu"))
    forced = ForcedBlocks(BLOCK_SIZE, Nk * BLOCK_SIZE, BLOCK_SIZE)
    found = blocks.select_block_lists(scores, 0.5, forced)
    assert called == expected
    if not called:
        assert_same_lists(found, select_blocks(scores, 0.5))


@pytest.mark.gpu
@pytest.mark.parametrize("Nk", [931, 1024, 1025, 2048, 5000])
def test_long_rows(Nk, device):
    scores = exact_scores(1, 3, 65, Nk, device, levels=8)
    for threshold in (0.05, 0.5, 0.95):
        assert_same_lists(select(scores, threshold), select_blocks(scores, threshold))
    scores = random_scores(1, 2, 16, Nk, device)
    mask = select(scores, 0.9).to_mask()
    for row, kept in zip(scores.flatten(0, 2), mask.flatten(0, 2), strict=True):
        assert_smallest_set(row, kept, 0.9)


@pytest.mark.parametrize("block_size", [64, 128])
def test_the_diagonal_of_a_cut_last_row_is_forced(block_size, device):
    """The last row holds one query, which sees the last key."""
    forced = ForcedBlocks(129, 256, block_size, causal=True)
    Nq, Nk = -(-129 // block_size), 256 // block_size
    scores = torch.full((1, 1, Nq, Nk), 2.0**-20, device=device)
    scores[..., 0] = 1.0
    mask = forced.to_mask(device).expand_as(scores)
    assert mask[0, 0, -1].nonzero().flatten().tolist() == [0, Nk - 1]
    assert_same_lists(select(scores, 0.5, forced), select_blocks(scores, 0.5, forced=mask))


@pytest.mark.parametrize("past", [0, 1, 100, 128, 200])
def test_every_query_sees_its_own_key(past, device):
    """A part of a prompt begins anywhere; its rows then lie on two blocks of the diagonal."""
    Sq, Sk = 300, past + 300
    forced = ForcedBlocks(Sq, Sk, 64, causal=True)
    scores = torch.full((1, 1, 5, -(-Sk // 64)), 2.0**-20, device=device)
    scores[..., 0] = 1.0
    kept = select(scores, 0.5, forced)
    queries = torch.arange(Sq, device=device)
    assert kept.to_mask()[0, 0, queries // 64, (queries + past) // 64].all()
    mask = forced.to_mask(device).expand_as(scores)
    assert_same_lists(kept, select_blocks(scores, 0.5, forced=mask))


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_row_that_is_not_finite_keeps_all_on_every_path(bad, device):
    scores = torch.full((1, 1, 2, 20), 2.0**-8, device=device)
    scores[..., 17:] = 0
    scores[0, 0, 1, 5] = bad
    expected = [[[1, 17]]]
    assert select(scores, 2.0**-8).counts.tolist() == expected
    assert select_blocks(scores, 2.0**-8).sum(dim=-1).tolist() == expected


@pytest.mark.parametrize("density", [0.01, 0.25, 0.3, 0.99, 1.0])
@pytest.mark.parametrize("num_text_tokens", [0, 70])
def test_a_share_of_the_blocks_is_what_the_torch_path_keeps(density, num_text_tokens, device):
    lengths = torch.tensor([1200, 1131], dtype=torch.int32, device=device)
    forced = ForcedBlocks(1200, 1200, BLOCK_SIZE, False, num_text_tokens, lengths)
    scores = exact_scores(2, 1, 19, 19, device)
    scores[1, ..., 18:] = 0
    scores[0, 0, 3, 5] = torch.nan
    mask = forced.to_mask(device)
    if mask is None:
        mask = torch.zeros((), dtype=torch.bool, device=device)
    rows = torch.tensor(density, device=device)
    expected = fewest_blocks(scores, rows, mask.expand_as(scores), by_count=True)
    assert_same_lists(select(scores, density, forced, by_count=True), expected)
