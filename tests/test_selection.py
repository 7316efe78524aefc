import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import assert_smallest_set

from xattn_video import block_scores, select_blocks
from xattn_video.ops.blocks import ForcedBlocks, fewest_blocks, select_block_lists


def random_scores(*shape, sharpness=3.0):
    return (torch.randn(*shape) * sharpness).softmax(-1)


@settings(max_examples=60, deadline=None)
@given(
    num_blocks=st.integers(1, 40),
    sharpness=st.floats(0, 12),
    threshold=st.floats(0.01, 1.0),
    forced_share=st.sampled_from([0.0, 0.2, 1.0]),
    invalid=st.integers(0, 5),
    seed=st.integers(0, 2**31),
)
def test_the_kept_set_is_the_smallest_that_reaches_the_threshold(
    num_blocks, sharpness, threshold, forced_share, invalid, seed
):
    torch.manual_seed(seed)
    scores = random_scores(1, 2, 3, num_blocks, sharpness=sharpness)
    if 0 < invalid < num_blocks:
        scores[..., -invalid:] = 0
    forced = torch.rand(scores.shape) < forced_share
    mask = select_blocks(scores, threshold, forced=forced)
    for index in torch.cartesian_prod(torch.arange(2), torch.arange(3)):
        head, row = index.tolist()
        assert_smallest_set(
            scores[0, head, row], mask[0, head, row], threshold, forced[0, head, row]
        )


def test_density_grows_with_the_threshold():
    scores = random_scores(1, 2, 8, 64)
    densities = [select_blocks(scores, tau).float().mean() for tau in (0.1, 0.5, 0.9, 0.99, 1.0)]
    assert densities == sorted(densities)
    assert densities[-1] == 1


def test_forced_mass_counts():
    scores = torch.tensor([0.5, 0.3, 0.15, 0.05]).expand(1, 1, 1, 4)
    forced = torch.tensor([False, True, True, False]).expand(1, 1, 1, 4)
    assert select_blocks(scores, 0.44, forced=forced)[0, 0, 0].tolist() == [0, 1, 1, 0]
    assert select_blocks(scores, 0.46, forced=forced)[0, 0, 0].tolist() == [1, 1, 1, 0]


def test_mass_that_meets_the_threshold_exactly_is_enough():
    scores = torch.tensor([0.5, 0.25, 0.125, 0.125]).expand(1, 1, 1, 4)
    assert select_blocks(scores, 0.75)[0, 0, 0].tolist() == [True, True, False, False]


def test_no_block_is_kept_for_its_place():
    """Key block 0 has no privilege without `causal`: the authors' code always keeps it."""
    scores = torch.tensor([0.01, 0.98, 0.01]).expand(1, 1, 2, 3)
    assert not select_blocks(scores, 0.9)[..., 0].any()


def test_a_threshold_per_head_and_per_row():
    scores = random_scores(2, 3, 5, 32)
    per_head = torch.tensor([0.3, 0.6, 0.95])
    mask = select_blocks(scores, per_head[:, None])
    for head, tau in enumerate(per_head.tolist()):
        assert torch.equal(mask[:, head], select_blocks(scores, tau)[:, head])
    per_row = torch.linspace(0.2, 1.0, 5)
    mask = select_blocks(scores, per_row)
    for row, tau in enumerate(per_row.tolist()):
        assert torch.equal(mask[:, :, row], select_blocks(scores, tau)[:, :, row])


@pytest.mark.parametrize("threshold", [0.0, -1.0])
def test_a_threshold_that_nobody_looked_at_keeps_the_best_block(threshold):
    scores = torch.tensor([0.1, 0.0, 0.6, 0.3]).expand(1, 1, 2, 4)
    # A forced block that holds no valid key is no block to be content with.
    forced = torch.tensor([[False] * 4, [False, True, False, False]]).expand(1, 1, 2, 4)
    mask = fewest_blocks(scores, torch.tensor(threshold), forced)
    assert mask[0, 0].tolist() == [[False, False, True, False]] * 2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_scores_are_summed_in_float32(dtype):
    scores = random_scores(1, 1, 4, 3000, sharpness=0.5).to(dtype)
    assert torch.equal(select_blocks(scores, 0.9), select_blocks(scores.float(), 0.9))


def test_threshold_one_keeps_blocks_whose_mass_underflowed():
    query, key = torch.rand(1, 1, 256, 32), torch.rand(1, 1, 256, 32)
    key[:, :, :64] += 1e3
    scores = block_scores(query, key, block_size=64, key_lengths=torch.tensor([180]))
    assert select_blocks(scores, 1.0).sum(-1).eq(3).all()


def test_a_row_with_nan_keeps_every_valid_block():
    scores = random_scores(1, 1, 2, 8)
    scores[..., 6:] = 0
    scores[0, 0, 0, :6] = torch.nan
    mask = select_blocks(scores, 0.1)
    assert mask[0, 0, 0].tolist() == [True] * 6 + [False] * 2
    assert mask[0, 0, 1].sum() < 6


@pytest.mark.parametrize("threshold", [0.0, -0.1, 1.01, float("nan")])
def test_a_threshold_out_of_range_is_refused(threshold):
    with pytest.raises(ValueError, match=r"threshold must lie in \(0, 1\], got"):
        select_blocks(random_scores(1, 1, 2, 4), threshold)
    with pytest.raises(ValueError, match=r"threshold must lie in \(0, 1\], got values from"):
        select_blocks(random_scores(1, 1, 2, 4), torch.tensor([0.5, threshold]))


def test_a_threshold_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"broadcast to \[B, H, Nq\] = \[1, 3, 2\], got \[3\]"):
        select_blocks(random_scores(1, 3, 2, 4), torch.full((3,), 0.5))


@pytest.mark.parametrize("shape", [(2, 5), (1, 1, 1, 2, 4), (4, 2)])
def test_forced_blocks_of_another_shape_are_refused(shape):
    forced = torch.ones(shape, dtype=torch.bool)
    message = rf"\[B, H, Nq, Nk\] = \[1, 3, 2, 4\], got \[{', '.join(map(str, shape))}\]"
    with pytest.raises(ValueError, match=message):
        select_blocks(random_scores(1, 3, 2, 4), 0.5, forced=forced)


def test_what_holds_no_numbers_is_refused():
    scores = random_scores(1, 3, 2, 4)
    with pytest.raises(ValueError, match=r"forced must .*, got \[2, 4\] on the meta device"):
        select_blocks(scores, 0.5, forced=torch.ones(2, 4, dtype=torch.bool, device="meta"))
    with pytest.raises(ValueError, match=r"threshold must .*, got \[\] on the meta device"):
        select_blocks(scores, torch.ones((), device="meta"))


def share_of_blocks(scores, density, num_text_tokens=0, key_lengths=None):
    """The mask that a share of the blocks of 8 tokens gives."""
    tokens = scores.shape[-1] * 8
    forced = ForcedBlocks(tokens, tokens, 8, False, num_text_tokens, key_lengths)
    return select_block_lists(scores, density, forced, by_count=True).to_mask()


@pytest.mark.parametrize(
    ("density", "kept"),
    [(0.01, 1), (0.1, 2), (0.12, 2), (0.13, 3), (0.5, 10), (0.98, 20), (1, 20)],
)
def test_a_share_of_the_blocks_is_that_of_the_best(density, kept):
    scores = random_scores(1, 2, 20, 20)
    mask = share_of_blocks(scores, density)
    assert (mask.sum(-1) == kept).all()
    assert torch.equal(mask, scores >= scores.sort(-1).values[..., -kept, None])


def test_a_share_is_of_the_valid_blocks_and_forced_ones_count_first():
    scores = random_scores(2, 1, 10, 10)
    scores[1, ..., 8:] = 0
    lengths = torch.tensor([80, 60], dtype=torch.int32)
    mask = share_of_blocks(scores, 0.5, num_text_tokens=20, key_lengths=lengths)
    # Item 0 has text in block 7 to 9, item 1 none: 60 keys are video.
    assert mask[0, 0, :7].sum(-1).tolist() == [5] * 7
    assert mask[0, 0, :, 7:].all()
    assert mask[0, 0, 7:].all()
    assert mask[1, 0].sum(-1).tolist() == [4] * 10
