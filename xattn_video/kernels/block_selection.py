"""Selects blocks: turns a row of scores directly into the list that attention kernels read.

A program holds one row. It finds the score at which the kept mass reaches the threshold without a
sort, by bisection over the bits of float32: non-negative numbers are ordered as their bits. Sums
run in one fixed order and rounding is monotonic, so the kept mass never grows with the cut. With
BY_COUNT each block weighs 1 instead of its mass.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

_INFINITY_BITS = tl.constexpr(0x7F800000)
# The smallest normal float32, which is the lowest score of a valid block.
_SMALLEST_TARGET = tl.constexpr(2.0**-126)
# Rows that see fewer blocks than this share a launch.
_FEWEST_COLUMNS = 256


@triton.jit
def _forced_blocks(
    columns, m, key_length, Sq, Sk, num_video_tokens,
    BLOCK_SIZE: tl.constexpr, CAUSAL: tl.constexpr, TEXT: tl.constexpr,
):  # fmt: skip
    """The blocks of row ``m`` that are kept at any score."""
    forced = columns < 0
    if CAUSAL:
        last_query = tl.minimum((m + 1) * BLOCK_SIZE, Sq) - 1
        first = tl.maximum(m * BLOCK_SIZE + Sk - Sq, 0) // BLOCK_SIZE
        last = tl.maximum(last_query + Sk - Sq, 0) // BLOCK_SIZE
        forced = (columns == 0) | ((columns >= first) & (columns <= last))
    if TEXT:
        first_text_block = num_video_tokens // BLOCK_SIZE
        text_row = (m >= first_text_block) & (m * BLOCK_SIZE < key_length)
        forced = (key_length > num_video_tokens) & (text_row | (columns >= first_text_block))
    return forced


@triton.jit
def _cut_bits(bits, weights, kept, target):
    """The bits of the cut, the largest score down to which blocks must be kept; inf if none."""
    low = tl.full([], 0, dtype=tl.int32)
    high = tl.full([], _INFINITY_BITS, dtype=tl.int32)
    for _ in range(31):
        middle = low + (high - low + 1) // 2
        enough = kept + tl.sum(tl.where(bits >= middle, weights, 0.0), axis=0) >= target
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, tl.maximum(middle - 1, low))
    return low


@triton.jit(
    do_not_specialize=[
        "H", "Sq", "Sk", "Nq", "Nk", "num_video_tokens", "first_row", "num_rows",
    ]
)  # fmt: skip
def _block_selection_kernel(
    scores_ptr, threshold_ptr, key_lengths_ptr, counts_ptr, indices_ptr,
    stride_tb, stride_th, stride_tm, H, Sq, Sk, Nq, Nk, num_video_tokens, first_row, num_rows,
    BLOCK_SIZE: tl.constexpr, CAUSAL: tl.constexpr, TEXT: tl.constexpr,
    BY_COUNT: tl.constexpr, PADDED_COLUMNS: tl.constexpr,
):  # fmt: skip
    """One of ``num_rows`` rows of blocks of a head; they see at most PADDED_COLUMNS blocks."""
    m = first_row + tl.program_id(0) % num_rows
    head = (tl.program_id(0) // num_rows).to(tl.int64)
    row = head * Nq + m
    b, h = head // H, head % H
    key_length = Sk
    if key_lengths_ptr is not None:
        key_length = tl.load(key_lengths_ptr + b)
    threshold = tl.load(threshold_ptr + b * stride_tb + h * stride_th + m * stride_tm)

    columns = tl.arange(0, PADDED_COLUMNS)
    inside = columns < Nk
    seen = inside
    if CAUSAL:
        seen = columns * BLOCK_SIZE < tl.minimum((m + 1) * BLOCK_SIZE, Sq) + Sk - Sq
    # [PADDED_COLUMNS]
    scores = tl.load(scores_ptr + row * Nk + columns, mask=seen, other=0.0)
    total = tl.sum(scores, axis=0)
    weights = scores
    target = threshold * total
    if BY_COUNT:
        weights = tl.where(scores != 0.0, 1.0, 0.0)
        target = tl.maximum(tl.floor(threshold * tl.sum(weights, axis=0) + 0.5), 1.0)
    # An unchecked threshold may be too low; the best block is kept anyway.
    target = tl.where(target > _SMALLEST_TARGET, target, _SMALLEST_TARGET)
    forced = _forced_blocks(
        columns, m, key_length, Sq, Sk, num_video_tokens, BLOCK_SIZE, CAUSAL, TEXT
    )
    kept = tl.sum(tl.where(forced, weights, 0.0), axis=0)
    weights = tl.where(forced, 0.0, weights)
    bits = tl.where(forced, 0.0, scores).to(tl.int32, bitcast=True)

    cut = _cut_bits(bits, weights, kept, target)
    above = bits > cut
    # Of the blocks that score exactly the cut, the first ones are kept, as many as needed.
    tied = (bits == cut) & inside
    kept_above = kept + tl.sum(tl.where(above, weights, 0.0), axis=0)
    ties_before = (tl.cumsum(tied.to(tl.int32), axis=0) - 1).to(tl.float32)
    tied_weight = cut.to(tl.float32, bitcast=True)
    if BY_COUNT:
        tied_weight = 1.0
    needed = kept_above + ties_before * tied_weight < target
    keep = above | (tied & needed) | forced
    # Comparisons with NaN are false, so a sum that is not finite keeps every block as well.
    bounded = (threshold < 1.0) & (total < float("inf"))
    keep = tl.where(bounded, keep, True) & inside & (scores != 0.0)

    kept_through = tl.cumsum(keep.to(tl.int32), axis=0)
    count = tl.sum(keep.to(tl.int32), axis=0)
    positions = tl.where(keep, kept_through - 1, count + columns - kept_through)
    tl.store(indices_ptr + row * Nk + positions, columns, mask=inside)
    tl.store(counts_ptr + row, count)
    for first in tl.range(PADDED_COLUMNS, Nk, PADDED_COLUMNS):
        unseen = first + columns
        tl.store(indices_ptr + row * Nk + unseen, unseen, mask=unseen < Nk)


def _row_groups(Nq: int, Nk: int, before: int) -> Iterator[tuple[int, int, int]]:
    """First row, number of rows, and a power of two of columns that covers all they see.

    Row m sees at most ``before`` + m + 2 key blocks.
    """
    widest = triton.next_power_of_2(Nk)
    row = 0
    while row < Nq:
        columns = min(max(triton.next_power_of_2(before + row + 2), _FEWEST_COLUMNS), widest)
        stop = Nq if columns == widest else min(columns - before - 1, Nq)
        yield row, stop - row, columns
        row = stop


def block_selection(
    scores: Tensor,
    threshold: Tensor,
    *,
    query_length: int,
    key_length: int,
    block_size: int,
    causal: bool,
    num_text_tokens: int,
    key_lengths: Tensor | None,
    by_count: bool = False,
) -> tuple[Tensor, Tensor]:
    """List, for each row, the fewest blocks whose mass reaches the threshold.

    Forced blocks come first. If ``causal``, these are key block 0 and the diagonal. With text,
    they are every block that touches a valid text key, and every valid block of the rows that hold
    a valid text query. Then follow blocks by falling score; of equal scores, the first block wins.

    Args:
        scores: float32 `[B, H, Nq, Nk]`, not negative. If ``causal``, blocks above the diagonal
            count as 0.
        threshold: float32 `[B, H, Nq]`, any strides, on the same device. A value that is not above
            0 keeps the best block; a value that is not below 1, NaN included, keeps every block.
        query_length: Sq.
        key_length: Sk, text included.
        block_size: Tokens in a block.
        causal: Whether query t sees keys up to t + Sk - Sq only.
        num_text_tokens: Number of text tokens, the last of the Sk tokens, padding included.
        key_lengths: Valid keys of each item, int32 `[B]` on the same device, or None for all.
        by_count: The threshold is a share of the row's valid blocks, rounded to whole ones.

    Returns:
        counts, int32 `[B, H, Nq]`: kept blocks of each row; and indices, int32 `[B, H, Nq, Nk]`:
        the kept blocks first, ascending, then the others, ascending. A row whose scores are not
        all finite keeps every block that does not score 0.
    """
    B, H, Nq, Nk = scores.shape
    assert threshold.shape == (B, H, Nq), (threshold.shape, (B, H, Nq))
    scores = scores.contiguous()
    counts = torch.empty(B, H, Nq, dtype=torch.int32, device=scores.device)
    indices = torch.empty(B, H, Nq, Nk, dtype=torch.int32, device=scores.device)
    # The block of the last key before the first query; -1 if there is none.
    before = (key_length - query_length - 1) // block_size if causal else Nk
    with torch.cuda.device_of(scores):
        for first_row, num_rows, padded_columns in _row_groups(Nq, Nk, before):
            _block_selection_kernel[(B * H * num_rows,)](
                scores, threshold, key_lengths, counts, indices, *threshold.stride(),
                H, query_length, key_length, Nq, Nk, key_length - num_text_tokens,
                first_row, num_rows, BLOCK_SIZE=block_size, CAUSAL=causal,
                TEXT=num_text_tokens > 0, BY_COUNT=by_count, PADDED_COLUMNS=padded_columns,
                # 32 blocks per thread; more warps would wait for each other in every sum.
                num_warps=max(1, padded_columns // 1024),
            )  # fmt: skip
    return counts, indices
