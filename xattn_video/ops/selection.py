"""Choice of the blocks to compute (XAttention, arXiv:2503.16428, section 2.2)."""

import torch
import torch.nn.functional as F
from torch import Tensor

from xattn_video.kernels.support import device_unsupported_reasons
from xattn_video.ops.arguments import check_movable, check_same_device, check_threshold
from xattn_video.ops.blocks import BlockLists
from xattn_video.ops.forced import ForcedBlocks

# Longer rows do not stay in the registers of a program; they are sorted.
_LARGEST_KERNEL_ROW = 8192
# What a single valid block reaches.
_SMALLEST_TARGET = torch.finfo(torch.float32).tiny


def select_blocks(
    scores: Tensor, threshold: float | Tensor, *, forced: Tensor | None = None
) -> Tensor:
    """Keep, in each row, the fewest blocks whose mass reaches the threshold.

    Forced blocks come first and their mass counts; then blocks by falling score until the kept
    mass is at least ``threshold`` times the row's sum. A block that scores 0 holds no valid key
    and is never kept; a threshold of 1 keeps all others, and every row keeps at least one of them.

    Args:
        scores: float32 `[B, H, Nq, Nk]`, not negative, as from `block_scores`; of another
            floating-point type they are summed in float32 at least.
        threshold: Share of the mass, in (0, 1]; or a tensor of them that broadcasts to
            `[B, H, Nq]`, for instance `[H, 1]` for one per head. It is copied to the device of
            the scores. Its values are checked where it is on the CPU. Elsewhere a look at them
            would make the host wait: there what is not above 0 keeps the best block, and what is
            not below 1, NaN too, every block.
        forced: bool, broadcastable to ``scores``, same device; True = keep whatever the score.

    Returns:
        Block mask, bool `[B, H, Nq, Nk]`; True = compute. A row whose scores are not all finite
        keeps every block that does not score 0, so that attention propagates the NaN as dense
        attention would.

    Raises:
        ValueError, TypeError: The threshold is out of range, no number or does not broadcast, or
            shapes, dtypes or devices disagree.
    """
    if scores.dim() != 4 or not scores.is_floating_point():
        raise ValueError(
            f"scores must be float [B, H, Nq, Nk], got {scores.dtype} {list(scores.shape)}."
        )
    if scores.dtype.itemsize < torch.float32.itemsize:
        # Half precision loses the sum of many small scores.
        scores = scores.float()
    threshold = _as_row_threshold(threshold, scores)
    if forced is None:
        forced = scores.new_zeros((), dtype=torch.bool)
    else:
        _check_forced(forced, scores)
    return _fewest_blocks(scores, threshold, forced.expand_as(scores))


def _fewest_blocks(scores: Tensor, threshold: Tensor, forced: Tensor) -> Tensor:
    """`select_blocks` of what has been checked; the threshold broadcasts to `[B, H, Nq, 1]`."""
    order = scores.masked_fill(forced, float("inf")).argsort(dim=-1, descending=True, stable=True)
    ranked = scores.gather(-1, order)
    mass_before = F.pad(ranked.cumsum(dim=-1)[..., :-1], (1, 0))
    total = scores.sum(dim=-1, keepdim=True)
    target = threshold * total
    # A threshold that nobody looked at may be too low; the best block is kept all the same.
    target = target.where(target > _SMALLEST_TARGET, _SMALLEST_TARGET)
    keep = torch.zeros_like(order, dtype=torch.bool)
    keep.scatter_(-1, order, mass_before < target)
    # NaN compares with nothing.
    keep_all = ~(threshold < 1) | ~total.isfinite()
    return (keep | forced | keep_all) & (scores != 0)


def select_block_lists(
    scores: Tensor, threshold: float | Tensor, forced: ForcedBlocks
) -> BlockLists:
    """The choice of `select_blocks` as lists, without a mask in between where a kernel makes it.

    Args:
        scores: float32 `[B, H, Nq, Nk]`, as from `block_scores`.
        threshold: As in `select_blocks`.
        forced: Describes the blocks that are kept whatever they score.

    Raises:
        ValueError: The threshold is out of range or does not broadcast.
    """
    on_kernel = scores.is_cuda and scores.shape[-1] <= _LARGEST_KERNEL_ROW
    if not on_kernel or device_unsupported_reasons(scores.device):
        forced_mask = forced.to_mask(scores.device)
        return BlockLists.from_mask(select_blocks(scores, threshold, forced=forced_mask))
    # Imported here so that selection works where Triton is missing.
    from xattn_video.kernels.block_selection import block_selection

    row_threshold = _as_row_threshold(threshold, scores).squeeze(-1)
    counts, indices = block_selection(
        scores,
        row_threshold.expand(scores.shape[:-1]),
        query_length=forced.query_length,
        key_length=forced.key_length,
        block_size=forced.block_size,
        causal=forced.causal,
        num_text_tokens=forced.num_text_tokens,
        key_lengths=forced.key_lengths,
    )
    return BlockLists(counts, indices)


def _check_forced(forced: Tensor, scores: Tensor) -> None:
    if forced.dtype != torch.bool:
        raise TypeError(f"forced must be a bool tensor, got {forced.dtype}.")
    check_same_device(scores=scores, forced=forced)
    if not _broadcasts(forced, scores.shape):
        raise ValueError(
            f"forced must broadcast to scores, [B, H, Nq, Nk] = {list(scores.shape)}, "
            f"got {list(forced.shape)}."
        )


def _broadcasts(tensor: Tensor, shape: torch.Size) -> bool:
    """Whether the tensor can be expanded to the shape."""
    axes = zip(reversed(tensor.shape), reversed(shape), strict=False)
    return tensor.dim() <= len(shape) and all(found in (1, want) for found, want in axes)


def _as_row_threshold(threshold: float | Tensor, scores: Tensor) -> Tensor:
    """The threshold as a tensor that broadcasts to `[B, H, Nq, 1]`."""
    if not isinstance(threshold, Tensor):
        return scores.new_full((), check_threshold(threshold))
    check_movable("threshold", threshold, scores)
    if threshold.device.type == "cpu" and not bool(((threshold > 0) & (threshold <= 1)).all()):
        raise ValueError(
            f"threshold must lie in (0, 1], got values from {threshold.min().item()} "
            f"to {threshold.max().item()}; try 0.9 or 0.95."
        )
    rows = scores.shape[:-1]
    if not _broadcasts(threshold, rows):
        raise ValueError(
            f"threshold must broadcast to [B, H, Nq] = {list(rows)}, got {list(threshold.shape)}; "
            "one per head is [H, 1]."
        )
    return threshold.to(device=scores.device, dtype=scores.dtype).unsqueeze(-1)
