"""Choice of the blocks to compute (XAttention, arXiv:2503.16428, section 2.2)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from xattn_video.ops.arguments import (
    broadcasts,
    check_block_size,
    check_inference,
    check_key_lengths,
    check_name,
    check_pair,
    check_same_device,
    check_scale,
    check_tensor,
    check_text,
    check_thresholds,
)
from xattn_video.ops.blocks import BlockLists, ForcedBlocks, fewest_blocks, select_block_lists
from xattn_video.ops.scoring import Precision, ScoringInputs, compute_scores


def select_blocks(
    scores: Tensor, threshold: float | Tensor, *, forced: Tensor | None = None
) -> Tensor:
    """Keep, in each row, the fewest blocks whose mass reaches the threshold.

    Forced blocks come first and their mass counts; then blocks by falling score until the kept
    mass is at least ``threshold`` times the row's sum. A block that scores 0 holds no valid key
    and is never kept; a threshold of 1 keeps all others, and every row keeps at least one of them.

    Args:
        scores: float32 `[B, H, Nq, Nk]`, not negative, as from `block_scores`. Smaller
            floating-point types are converted to float32.
        threshold: Share of the mass, in (0, 1]; or a tensor of shares that broadcasts to
            `[B, H, Nq]`, for instance `[H, 1]` for one per head. It is copied to the device of
            the scores. Values on the CPU are checked. Values elsewhere are not, because the host
            would have to wait: a value that is not above 0 keeps the best block, and a value that
            is not below 1, NaN included, keeps every block.
        forced: bool, broadcastable to ``scores``, same device; True = keep at any score.

    Returns:
        Block mask, bool `[B, H, Nq, Nk]`; True = compute. A row whose scores are not all finite
        keeps every block that does not score 0, so that attention propagates the NaN as dense
        attention would.

    Raises:
        ValueError, TypeError: The threshold is out of range, not a number or does not broadcast,
            or shapes, dtypes or devices disagree.
    """
    check_tensor("scores", scores, "float [B, H, Nq, Nk]")
    if scores.dim() != 4 or not scores.is_floating_point():
        raise ValueError(
            f"scores must be float [B, H, Nq, Nk], got {scores.dtype} {list(scores.shape)}."
        )
    if scores.dtype.itemsize < torch.float32.itemsize:
        # Half precision loses the sum of many small scores.
        scores = scores.float()
    rows = check_thresholds(threshold, scores.shape[:-1], scores.device)
    if forced is None:
        forced = scores.new_zeros((), dtype=torch.bool)
    else:
        _check_forced(forced, scores)
    return fewest_blocks(scores, rows, forced.expand_as(scores))


def _check_forced(forced: Tensor, scores: Tensor) -> None:
    check_tensor("forced", forced, "bool, broadcastable to scores")
    if forced.dtype != torch.bool:
        raise TypeError(f"forced must be a bool tensor, got {forced.dtype}.")
    check_same_device(scores=scores, forced=forced)
    if not broadcasts(forced, scores.shape):
        raise ValueError(
            f"forced must broadcast to scores, [B, H, Nq, Nk] = {list(scores.shape)}, "
            f"got {list(forced.shape)}."
        )


def select(
    query: Tensor,
    key: Tensor,
    *,
    threshold: float | Tensor = 0.9,
    stride: int = 8,
    block_size: int = 128,
    causal: bool = False,
    num_text_tokens: int = 0,
    key_lengths: Tensor | Sequence[int] | None = None,
    scale: float | None = None,
    scoring_precision: Precision = "auto",
) -> BlockLists:
    """The blocks that `xattention` would compute, as lists for `attend`; same arguments.

    Raises:
        ValueError, TypeError: An argument is out of range or of a wrong type, or shapes, dtypes
            or devices disagree, or the inputs need gradients.
    """
    check_pair(query, key, causal)
    check_inference(query, key)
    check_block_size(block_size, stride)
    check_text(num_text_tokens, query, key, causal)
    check_name("scoring_precision", scoring_precision)
    rows = (*query.shape[:2], -(-query.shape[2] // block_size))
    tau = check_thresholds(threshold, rows, query.device)
    lengths = check_key_lengths(key_lengths, query, key)
    scale = check_scale(scale, query)
    inputs = ScoringInputs(
        query, key, block_size, stride, causal, lengths, scale, scoring_precision
    )
    return run_select(inputs, tau, num_text_tokens)


def run_select(inputs: ScoringInputs, threshold: Tensor, num_text_tokens: int) -> BlockLists:
    """`compute_selection` as an opaque operation."""
    counts, indices = torch.ops.xattn_video.select(
        inputs.query,
        inputs.key,
        threshold,
        inputs.key_lengths,
        inputs.stride,
        inputs.block_size,
        inputs.causal,
        num_text_tokens,
        inputs.scale,
        inputs.precision,
    )
    return BlockLists(counts, indices)


def compute_selection(
    inputs: ScoringInputs,
    threshold: Tensor,
    num_text_tokens: int = 0,
    by_count: bool = False,
) -> BlockLists:
    """`select` for checked inputs.

    The threshold is float32, on the device of the query, and broadcasts to `[B, H, Nq]`. With
    ``by_count`` it is the share of each row's valid blocks to keep.
    """
    forced = ForcedBlocks(
        inputs.query.shape[2],
        inputs.key.shape[2],
        inputs.block_size,
        inputs.causal,
        num_text_tokens,
        inputs.key_lengths,
    )
    return select_block_lists(compute_scores(inputs), threshold, forced, by_count)


def _select(
    query: Tensor,
    key: Tensor,
    threshold: Tensor,
    key_lengths: Tensor | None,
    stride: int,
    block_size: int,
    causal: bool,
    num_text_tokens: int,
    scale: float,
    precision: Precision,
) -> tuple[Tensor, Tensor]:
    inputs = ScoringInputs(query, key, block_size, stride, causal, key_lengths, scale, precision)
    blocks = compute_selection(inputs, threshold, num_text_tokens)
    return blocks.counts, blocks.indices


# Opaque to torch.compile, so that a compiled model keeps whole graphs: the schema is written out
# because its inference from annotations differs between versions of torch.
_select_op = torch.library.custom_op(
    "xattn_video::select",
    _select,
    mutates_args=(),
    schema=(
        "(Tensor query, Tensor key, Tensor threshold, Tensor? key_lengths, int stride, "
        "int block_size, bool causal, SymInt num_text_tokens, float scale, str precision) "
        "-> (Tensor, Tensor)"
    ),
)


@_select_op.register_fake
def _(
    query: Tensor,
    key: Tensor,
    threshold: Tensor,
    key_lengths: Tensor | None,
    stride: int,
    block_size: int,
    *_: object,
) -> tuple[Tensor, Tensor]:
    B, H, Sq, _D = query.shape
    rows, columns = -(-Sq // block_size), -(-key.shape[2] // block_size)
    counts = query.new_empty(B, H, rows, dtype=torch.int32)
    return counts, counts.new_empty(B, H, rows, columns)
