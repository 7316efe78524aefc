"""Antidiagonal block scores in one pass over the keys.

Groups of `stride` tokens make the product a plain matrix product with `stride * head_dim` as its
inner dimension. A program holds a tile of query groups, walks the key groups once and keeps, for
each of its rows and each key block, the sum of exp2(product - maximum of the row in this tile of
keys). Once a row's maximum over all keys is known, these partial sums are rescaled and added up
to block scores. They live in a scratch of one tile per program, so that nothing of the size of
the scores between single groups is ever in memory.
"""

import functools
import math
from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from xattn_video.kernels.support import (
    INTERPRETING,
    kernel_unsupported_reasons,
    with_unit_stride,
)

# Stands for the maximum of no products at all; finite, so that differences of maxima are.
_LOWEST = tl.constexpr(-1e38)
_SMALLEST_NORMAL = tl.constexpr(torch.finfo(torch.float32).tiny)


@triton.jit
def _fold_tile(
    products, partial_ptr, maxima_ptr, running_maximum, running_sum, n, tiles_n,
    GROUPS: tl.constexpr,
):  # fmt: skip
    """Put down, for each row of a tile, the sum of each key block and the maximum it refers to."""
    TILE_M: tl.constexpr = products.shape[0]
    COLUMNS: tl.constexpr = products.shape[1] // GROUPS
    maximum = tl.maximum(tl.max(products, axis=1), _LOWEST)
    weights = tl.exp2(products - maximum[:, None])
    # [TILE_M, COLUMNS]
    partial = tl.sum(tl.reshape(weights, [TILE_M, COLUMNS, GROUPS]), axis=2)
    rows = tl.arange(0, TILE_M).to(tl.int64)
    columns = n * COLUMNS + tl.arange(0, COLUMNS)
    tl.store(partial_ptr + rows[:, None] * (tiles_n * COLUMNS) + columns[None, :], partial)
    tl.store(maxima_ptr + rows * tiles_n + n, maximum)
    new_maximum = tl.maximum(running_maximum, maximum)
    running_sum *= tl.exp2(running_maximum - new_maximum)
    running_sum += tl.sum(partial, axis=1) * tl.exp2(maximum - new_maximum)
    return new_maximum, running_sum


@triton.jit
def _store_scores(
    scores_ptr, partial_ptr, maxima_ptr, running_maximum, running_sum, end_m, first_row, walked,
    pitch, tiles_n, Nq, Nk,
    BLOCK_SIZE: tl.constexpr, GROUPS: tl.constexpr, COLUMNS: tl.constexpr,
    STORE_COLUMNS: tl.constexpr,
):  # fmt: skip
    """Rescale the partial sums of a tile of query groups and add them up to block scores."""
    TILE_M: tl.constexpr = end_m.shape[0]
    ROWS: tl.constexpr = TILE_M // GROUPS
    rows = tl.arange(0, TILE_M).to(tl.int64)
    share = tl.where(end_m > 0, 1.0 / tl.where(end_m > 0, running_sum, 1.0), 0.0)
    # [ROWS]
    block_rows = first_row + tl.arange(0, ROWS)
    block_ends = tl.max(tl.reshape(end_m, [ROWS, GROUPS]), axis=1)
    seeing = tl.sum(tl.reshape((end_m > 0).to(tl.int32), [ROWS, GROUPS]), axis=1)
    groups_seeing = tl.maximum(seeing, 1).to(tl.float32)
    for first_column in tl.range(0, Nk, STORE_COLUMNS):
        columns = first_column + tl.arange(0, STORE_COLUMNS)
        mask_n = (columns < walked * COLUMNS)[None, :]
        # [TILE_M, STORE_COLUMNS]
        partial_ptrs = partial_ptr + rows[:, None] * pitch + columns[None, :]
        partial = tl.load(partial_ptrs, mask=mask_n, other=0.0)
        maxima_ptrs = maxima_ptr + rows[:, None] * tiles_n + (columns // COLUMNS)[None, :]
        maxima = tl.load(maxima_ptrs, mask=mask_n, other=_LOWEST)
        mass = partial * tl.exp2(maxima - running_maximum[:, None]) * share[:, None]
        # [ROWS, STORE_COLUMNS]
        mass = tl.sum(tl.reshape(mass, [ROWS, GROUPS, STORE_COLUMNS]), axis=1)
        scores = tl.maximum(
            mass / groups_seeing[:, None], _SMALLEST_NORMAL, propagate_nan=tl.PropagateNan.ALL
        )
        valid = (columns * BLOCK_SIZE)[None, :] < block_ends[:, None]
        tl.store(
            scores_ptr + block_rows[:, None].to(tl.int64) * Nk + columns[None, :],
            tl.where(valid, scores, 0.0),
            mask=(block_rows < Nq)[:, None] & (columns < Nk)[None, :],
        )


@triton.jit(do_not_specialize=["B", "H", "Sq", "Sk", "Nq", "Nk"])
def _antidiagonal_scores_kernel(
    query_ptr, key_ptr, scores_ptr, partial_ptr, maxima_ptr, key_lengths_ptr,
    stride_qb, stride_qh, stride_qs, stride_kb, stride_kh, stride_ks,
    B, H, Sq, Sk, Nq, Nk, scale_log2,
    HEAD_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr, STRIDE: tl.constexpr, CAUSAL: tl.constexpr,
    TILE_M: tl.constexpr, TILE_N: tl.constexpr, TILE_K: tl.constexpr,
    STORE_COLUMNS: tl.constexpr, INPUT_PRECISION: tl.constexpr,
):  # fmt: skip
    """TILE_M // GROUPS rows of blocks at a time, by programs that take turns."""
    GROUPS: tl.constexpr = BLOCK_SIZE // STRIDE
    COLUMNS: tl.constexpr = TILE_N // GROUPS
    CHUNKS: tl.constexpr = HEAD_DIM // TILE_K
    STEPS: tl.constexpr = STRIDE * CHUNKS
    tiles_m = tl.cdiv(Sq, TILE_M * STRIDE)
    tiles_n = tl.cdiv(Sk, TILE_N * STRIDE)
    pitch = tiles_n * COLUMNS
    # The scratch of this program.
    program = tl.program_id(0).to(tl.int64)
    partial_ptr += program * TILE_M * pitch
    maxima_ptr += program * TILE_M * tiles_n
    rows = tl.arange(0, TILE_M)

    for tile in tl.range(tl.program_id(0), B * H * tiles_m, tl.num_programs(0)):
        batch_head = (tile // tiles_m).to(tl.int64)
        b, h = batch_head // H, batch_head % H
        query_head_ptr = query_ptr + b * stride_qb + h * stride_qh
        key_head_ptr = key_ptr + b * stride_kb + h * stride_kh
        groups_m = (tile % tiles_m) * TILE_M + rows
        key_length = Sk
        if key_lengths_ptr is not None:
            key_length = tl.load(key_lengths_ptr + b)
        # [TILE_M], a query group sees the keys before this one.
        end_m = tl.zeros([TILE_M], dtype=tl.int32) + key_length
        if CAUSAL:
            end_m = tl.minimum(end_m, tl.minimum(groups_m * STRIDE + STRIDE, Sq) + (Sk - Sq))
        end_m = tl.where(groups_m * STRIDE < Sq, end_m, 0)
        seen_by_all, seen_by_any = tl.min(end_m, axis=0), tl.max(end_m, axis=0)

        running_maximum = tl.full([TILE_M], _LOWEST, dtype=tl.float32)
        running_sum = tl.zeros([TILE_M], dtype=tl.float32)
        walked = tl.cdiv(tl.maximum(seen_by_any, 0), TILE_N * STRIDE)
        products = tl.zeros([TILE_M, TILE_N], dtype=tl.float32)
        # One flat loop over tiles of keys and inner dimension, so that loads run ahead of both.
        for step in tl.range(0, walked * STEPS):
            n = step // STEPS
            s = (step % STEPS) // CHUNKS
            offsets_k = (step % CHUNKS) * TILE_K + tl.arange(0, TILE_K)
            groups_n = n * TILE_N + tl.arange(0, TILE_N)
            # A group that an end cuts repeats its last token.
            tokens_m = tl.minimum(groups_m * STRIDE + (STRIDE - 1 - s), Sq - 1).to(tl.int64)
            tokens_n = tl.maximum(tl.minimum(groups_n * STRIDE + s, key_length - 1), 0).to(
                tl.int64
            )
            # [TILE_M, TILE_K]
            query = tl.load(query_head_ptr + tokens_m[:, None] * stride_qs + offsets_k[None, :])
            # [TILE_N, TILE_K]
            key = tl.load(key_head_ptr + tokens_n[:, None] * stride_ks + offsets_k[None, :])
            products = tl.dot(query, tl.trans(key), products, input_precision=INPUT_PRECISION)
            if step % STEPS == STEPS - 1:
                products *= scale_log2
                if (n + 1) * TILE_N * STRIDE > seen_by_all:
                    visible = (groups_n * STRIDE)[None, :] < end_m[:, None]
                    products = tl.where(visible, products, -float("inf"))
                running_maximum, running_sum = _fold_tile(
                    products, partial_ptr, maxima_ptr, running_maximum, running_sum, n, tiles_n,
                    GROUPS,
                )  # fmt: skip
                products = tl.zeros([TILE_M, TILE_N], dtype=tl.float32)

        # A thread reads what others of its program wrote, here and again in the next turn.
        tl.debug_barrier()
        _store_scores(
            scores_ptr + batch_head * Nq * Nk, partial_ptr, maxima_ptr, running_maximum,
            running_sum, end_m, (tile % tiles_m) * (TILE_M // GROUPS), walked, pitch, tiles_n,
            Nq, Nk, BLOCK_SIZE, GROUPS, COLUMNS, STORE_COLUMNS,
        )  # fmt: skip
        tl.debug_barrier()


@dataclass(frozen=True, slots=True)
class _Tiles:
    """How the work is cut: query groups, key groups and inner dimension of a tile."""

    tile_m: int
    tile_n: int
    tile_k: int
    num_warps: int
    num_stages: int
    programs_per_multiprocessor: int


# In half precision the traffic from L2 is the limit, and it falls as tiles grow: 128 x 256
# accumulators are what the registers of 8 warps hold, 4 stages what 227 KiB of shared memory do.
_HALF_LARGE = _Tiles(128, 256, 64, num_warps=8, num_stages=4, programs_per_multiprocessor=1)
_HALF = _Tiles(128, 128, 32, num_warps=8, num_stages=3, programs_per_multiprocessor=1)
_SINGLE = _Tiles(64, 64, 32, num_warps=4, num_stages=2, programs_per_multiprocessor=2)
_INTERPRETED = _Tiles(64, 64, 128, num_warps=1, num_stages=1, programs_per_multiprocessor=1)


def _tiles(query: Tensor, groups: int) -> _Tiles:
    """The tiles for the dtype and the device; a tile holds whole blocks of ``groups`` groups."""
    if INTERPRETING:
        tiles = _INTERPRETED
    elif query.dtype == torch.float32:
        tiles = _SINGLE
    elif torch.cuda.get_device_capability(query.device) in ((9, 0), (10, 0)):
        tiles = _HALF_LARGE
    else:
        tiles = _HALF
    return replace(
        tiles,
        tile_m=max(tiles.tile_m, groups),
        tile_n=max(tiles.tile_n, groups),
        # The largest power of two that divides head_dim: no load needs a mask.
        tile_k=math.gcd(tiles.tile_k, query.shape[-1]),
    )


def _program_count(device: torch.device, tiles: _Tiles) -> int:
    """As many programs as run at once; two where kernels are interpreted."""
    if INTERPRETING:
        return 2
    multiprocessors: int = torch.cuda.get_device_properties(device).multi_processor_count
    return multiprocessors * tiles.programs_per_multiprocessor


def unsupported_reasons(
    device: torch.device, dtype: torch.dtype, head_dim: int, block_size: int, stride: int
) -> list[str]:
    """Every reason why `antidiagonal_scores` cannot run such inputs, each with its remedy."""
    reasons = kernel_unsupported_reasons(device, dtype, head_dim, block_size)
    if stride < 1 or stride & (stride - 1) or block_size % stride:
        reasons.append(
            "stride must be a power of two that divides block_size, got "
            f"stride={stride}, block_size={block_size}; use 4, 8 or 16."
        )
    return reasons


def antidiagonal_scores(
    query: Tensor,
    key: Tensor,
    *,
    block_size: int,
    stride: int,
    causal: bool,
    key_lengths: Tensor | None,
    scale: float,
) -> Tensor:
    """Score the blocks of the attention matrix by their antidiagonals (arXiv:2503.16428, 2.1).

    Args:
        query: `[B, H, Sq, D]`, any strides.
        key: `[B, H, Sk, D]`, same dtype and device, any strides.
        block_size: Tokens in a block, 64 or 128.
        stride: Tokens in a group, a power of two that divides ``block_size``.
        causal: Whether query t sees keys up to t + Sk - Sq only.
        key_lengths: Valid keys of each item, int32 `[B]` on the same device, or None for all.
        scale: Factor on the products of queries and keys.

    Returns:
        float32 `[B, H, Nq, Nk]`. A row sums to 1 over its valid blocks, none of which is 0; it is
        all 0 where its queries see no key. NaN or inf in the inputs makes the valid blocks of the
        rows they reach NaN.
    """
    B, H, Sq, D = query.shape
    Sk = key.shape[2]
    groups = block_size // stride
    assert block_size == groups * stride, (block_size, stride)
    query, key = with_unit_stride(query), with_unit_stride(key)
    Nq, Nk = triton.cdiv(Sq, block_size), triton.cdiv(Sk, block_size)
    tiles = _tiles(query, groups)
    tiles_n = triton.cdiv(Sk, tiles.tile_n * stride)
    turns = B * H * triton.cdiv(Sq, tiles.tile_m * stride)
    programs = min(turns, _program_count(query.device, tiles))
    single = functools.partial(torch.empty, dtype=torch.float32, device=query.device)
    scores = single(B, H, Nq, Nk)
    partial = single(programs, tiles.tile_m, tiles_n * (tiles.tile_n // groups))
    maxima = single(programs, tiles.tile_m, tiles_n)
    with torch.cuda.device_of(query):
        _antidiagonal_scores_kernel[(programs,)](
            query, key, scores, partial, maxima, key_lengths,
            *query.stride()[:3], *key.stride()[:3],
            B, H, Sq, Sk, Nq, Nk, scale / stride * math.log2(math.e),
            HEAD_DIM=D, BLOCK_SIZE=block_size, STRIDE=stride, CAUSAL=causal,
            TILE_M=tiles.tile_m, TILE_N=tiles.tile_n, TILE_K=tiles.tile_k, STORE_COLUMNS=64,
            INPUT_PRECISION="ieee",
            num_warps=tiles.num_warps, num_stages=tiles.num_stages,
        )  # fmt: skip
    return scores
