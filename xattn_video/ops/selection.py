"""Choice of the blocks to compute (XAttention, arXiv:2503.16428, section 2.2)."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from xattn_video.kernels.support import device_unsupported_reasons
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
from xattn_video.ops.blocks import BlockLists, ForcedBlocks
from xattn_video.ops.scoring import Precision, ScoringInputs, compute_scores

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
        ValueError, TypeError: The threshold is out of range, no number or does not broadcast, or
            shapes, dtypes or devices disagree.
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


def fewest_blocks(
    scores: Tensor, threshold: Tensor, forced: Tensor, by_count: bool = False
) -> Tensor:
    """`select_blocks` for checked inputs; the threshold broadcasts to `[B, H, Nq]`."""
    threshold = threshold.to(scores.dtype).unsqueeze(-1)
    order = scores.masked_fill(forced, float("inf")).argsort(dim=-1, descending=True, stable=True)
    weights = (scores != 0).to(scores.dtype) if by_count else scores
    before = F.pad(weights.gather(-1, order).cumsum(dim=-1)[..., :-1], (1, 0))
    total = scores.sum(dim=-1, keepdim=True)
    target = threshold * weights.sum(dim=-1, keepdim=True)
    if by_count:
        target = (target + 0.5).floor().clamp(min=1)
    # An unchecked threshold may be too low; the best block is kept anyway.
    target = target.where(target > _SMALLEST_TARGET, _SMALLEST_TARGET)
    keep = torch.zeros_like(order, dtype=torch.bool)
    keep.scatter_(-1, order, before < target)
    # NaN compares with nothing.
    keep_all = ~(threshold < 1) | ~total.isfinite()
    return (keep | forced | keep_all) & (scores != 0)


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
            or devices disagree.
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
    weights: Tensor | None = None,
) -> BlockLists:
    """`select` for checked inputs.

    The threshold is float32, on the device of the query, and broadcasts to `[B, H, Nq]`. With
    ``by_count`` it is the share of each row's valid blocks to keep, and the scores may be
    weighted by key block, float32 `[B, H, Nk]`.
    """
    forced = ForcedBlocks(
        inputs.query.shape[2],
        inputs.key.shape[2],
        inputs.block_size,
        inputs.causal,
        num_text_tokens,
        inputs.key_lengths,
    )
    scores = compute_scores(inputs)
    if weights is not None:
        scores *= weights[:, :, None]
    return select_block_lists(scores, threshold, forced, by_count)


def select_block_lists(
    scores: Tensor, threshold: float | Tensor, forced: ForcedBlocks, by_count: bool = False
) -> BlockLists:
    """The selection of `select_blocks` as lists; the kernel makes them without a mask.

    Args:
        scores: float32 `[B, H, Nq, Nk]`, as from `block_scores`.
        threshold: As in `select_blocks`, but not checked.
        forced: Describes the blocks that are kept at any score.
        by_count: The threshold is a share of each row's valid blocks, rounded to whole ones, and
            not of its mass: forced blocks count first, then come the best-scoring ones.
    """
    threshold = torch.as_tensor(threshold, dtype=torch.float32, device=scores.device)
    on_kernel = scores.is_cuda and scores.shape[-1] <= _LARGEST_KERNEL_ROW
    if not on_kernel or device_unsupported_reasons(scores.device):
        mask = forced.to_mask(scores.device)
        if mask is None:
            mask = scores.new_zeros((), dtype=torch.bool)
        mask = fewest_blocks(scores, threshold, mask.expand_as(scores), by_count)
        return BlockLists.from_mask(mask)
    # Imported here so that selection works where Triton is missing.
    from xattn_video.kernels.block_selection import block_selection

    counts, indices = block_selection(
        scores,
        threshold.expand(scores.shape[:-1]),
        query_length=forced.query_length,
        key_length=forced.key_length,
        block_size=forced.block_size,
        causal=forced.causal,
        num_text_tokens=forced.num_text_tokens,
        key_lengths=forced.key_lengths,
        by_count=by_count,
    )
    return BlockLists(counts, indices)


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
