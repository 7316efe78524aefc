"""Antidiagonal block scores: one matrix product, stored only as sums over key blocks.

With groups of `stride` tokens, this is a plain matrix product with the inner dimension `stride *
head_dim`. The first kernel computes it tile by tile; in causal attention it skips the tiles that
no query sees. For each row of a tile and each key block, it stores the sum of exp2(product -
maximum of the row in this tile), and the maximum. The second kernel takes a row of blocks,
rescales its sums to the maximum over all keys, and adds them up to scores. Memory holds the sums
of a few heads at a time, never the product.
"""

import functools
import math

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from xattn_video.kernels.float8_groups import quantize_groups, sampled_mean
from xattn_video.kernels.scoring_tiles import (
    choose_tiles,
    program_count,
    rectangles,
    seen_tiles,
)
from xattn_video.kernels.support import (
    INTERPRETING,
    kernel_unsupported_reasons,
    with_unit_stride,
)

# The maximum of no products; finite, so that differences of maxima are finite too.
_LOWEST = tl.constexpr(-1e38)
_SMALLEST_NORMAL = tl.constexpr(torch.finfo(torch.float32).tiny)
# Bytes of partial sums in memory at one time.
_SCRATCH_BYTES = 2**28


@triton.jit
def _ends(groups, key_length, Sq, Sk, STRIDE: tl.constexpr, CAUSAL: tl.constexpr):
    """The first key that each query group does not see; 0 for groups beyond the queries."""
    ends = tl.zeros_like(groups) + key_length
    if CAUSAL:
        ends = tl.minimum(ends, tl.minimum(groups * STRIDE + STRIDE, Sq) + (Sk - Sq))
    return tl.where(groups * STRIDE < Sq, ends, 0)


@triton.jit
def _locate(tile, num_m, num_n, RASTER: tl.constexpr):
    """Row and column of a tile, RASTER rows of tiles at a time so that neighbours share loads."""
    per_band = RASTER * num_n
    first_m = tile // per_band * RASTER
    height = tl.minimum(num_m - first_m, RASTER)
    return first_m + tile % per_band % height, tile % per_band // height


@triton.jit(
    do_not_specialize=[
        "first_head", "num_heads", "H", "group_size", "Sq", "Sk", "num_tiles", "first_m", "num_m",
        "first_n", "num_n",
    ]
)  # fmt: skip
def _partial_sums_kernel(
    query, key, query_scales_ptr, key_scales_ptr, partial_ptr, maxima_ptr, key_lengths_ptr,
    tiles_ptr, stride_qb, stride_qh, stride_qs, stride_kb, stride_kh, stride_ks,
    first_head, num_heads, H, group_size, Sq, Sk, num_tiles, first_m, num_m, first_n, num_n,
    scale_log2,
    HEAD_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr, STRIDE: tl.constexpr, CAUSAL: tl.constexpr,
    TILE_M: tl.constexpr, TILE_N: tl.constexpr, TILE_K: tl.constexpr, RASTER: tl.constexpr,
    DESCRIPTORS: tl.constexpr, INPUT_PRECISION: tl.constexpr,
):  # fmt: skip
    """A rectangle of num_m x num_n tiles of some heads, shared by persistent programs.

    With ``tiles_ptr`` only the tiles listed there are computed, each as m * tiles_n + n.
    With DESCRIPTORS query and key are TMA descriptors `[B, H, STRIDE, whole groups, HEAD_DIM]` and
    the rectangle holds only whole groups; else they are pointers. 8-bit operands come with the
    scales of their groups, `[B, H, groups]` and `[B, Hkv, groups]`.
    """
    COLUMNS: tl.constexpr = TILE_N // (BLOCK_SIZE // STRIDE)
    CHUNKS: tl.constexpr = HEAD_DIM // TILE_K
    tiles_m = tl.cdiv(Sq, TILE_M * STRIDE)
    tiles_n = tl.cdiv(Sk, TILE_N * STRIDE)
    for turn in tl.range(
        tl.program_id(0), num_heads * num_tiles, tl.num_programs(0), flatten=True
    ):
        local_head = turn // num_tiles
        if tiles_ptr is not None:
            tile = tl.load(tiles_ptr + turn % num_tiles)
            m, n = tile // tiles_n, tile % tiles_n
        else:
            m, n = _locate(turn % num_tiles, num_m, num_n, RASTER)
            m, n = m + first_m, n + first_n
        b, h = (first_head + local_head) // H, (first_head + local_head) % H
        key_h = h // group_size
        groups_m = m * TILE_M + tl.arange(0, TILE_M)
        groups_n = n * TILE_N + tl.arange(0, TILE_N)
        key_length = Sk
        if key_lengths_ptr is not None:
            key_length = tl.load(key_lengths_ptr + b)

        products = tl.zeros([TILE_M, TILE_N], dtype=tl.float32)
        for step in tl.range(0, STRIDE * CHUNKS):
            s = step // CHUNKS
            first_k = (step % CHUNKS) * TILE_K
            if DESCRIPTORS:
                query_tile = query.load([b, h, STRIDE - 1 - s, m * TILE_M, first_k])
                query_tile = tl.reshape(query_tile, [TILE_M, TILE_K])
                key_tile = key.load([b, key_h, s, n * TILE_N, first_k])
                key_tile = tl.reshape(key_tile, [TILE_N, TILE_K])
            else:
                offsets_k = first_k + tl.arange(0, TILE_K)
                # A group cut by the end of the tokens repeats the last token.
                tokens_m = tl.minimum(groups_m * STRIDE + (STRIDE - 1 - s), Sq - 1).to(tl.int64)
                tokens_n = tl.minimum(groups_n * STRIDE + s, key_length - 1).to(tl.int64)
                query_head = query + b.to(tl.int64) * stride_qb + h.to(tl.int64) * stride_qh
                key_head = key + b.to(tl.int64) * stride_kb + key_h.to(tl.int64) * stride_kh
                # [TILE_M, TILE_K]
                query_tile = tl.load(
                    query_head + tokens_m[:, None] * stride_qs + offsets_k[None, :]
                )
                # [TILE_N, TILE_K]
                key_tile = tl.load(key_head + tokens_n[:, None] * stride_ks + offsets_k[None, :])
            products = tl.dot(
                query_tile, tl.trans(key_tile), products, input_precision=INPUT_PRECISION
            )

        if query_scales_ptr is not None:
            batch_head = (first_head + local_head).to(tl.int64)
            key_batch_head = batch_head // group_size
            num_groups_m, num_groups_n = tl.cdiv(Sq, STRIDE), tl.cdiv(Sk, STRIDE)
            scales_m = tl.load(
                query_scales_ptr + batch_head * num_groups_m + groups_m,
                mask=groups_m < num_groups_m, other=0.0,
            )  # fmt: skip
            scales_n = tl.load(
                key_scales_ptr + key_batch_head * num_groups_n + groups_n,
                mask=groups_n < num_groups_n, other=0.0,
            )  # fmt: skip
            products *= scales_m[:, None] * scales_n[None, :]
        products *= scale_log2
        ends = _ends(groups_m, key_length, Sq, Sk, STRIDE, CAUSAL)
        if (n + 1) * TILE_N * STRIDE > tl.min(ends, axis=0):
            visible = (groups_n * STRIDE)[None, :] < ends[:, None]
            products = tl.where(visible, products, -float("inf"))
        maximum = tl.maximum(tl.max(products, axis=1), _LOWEST)
        weights = tl.exp2(products - maximum[:, None])
        # [TILE_M, COLUMNS]
        partial = tl.sum(tl.reshape(weights, [TILE_M, COLUMNS, TILE_N // COLUMNS]), axis=2)
        rows = local_head.to(tl.int64) * tiles_m * TILE_M + groups_m
        columns = n * COLUMNS + tl.arange(0, COLUMNS)
        tl.store(partial_ptr + rows[:, None] * (tiles_n * COLUMNS) + columns[None, :], partial)
        tl.store(maxima_ptr + rows * tiles_n + n, maximum)


@triton.jit(do_not_specialize=["first_head", "H", "Sq", "Sk", "Nq", "Nk", "tiles_m", "tiles_n"])
def _block_scores_kernel(
    scores_ptr, partial_ptr, maxima_ptr, key_lengths_ptr,
    first_head, H, Sq, Sk, Nq, Nk, tiles_m, tiles_n,
    BLOCK_SIZE: tl.constexpr, STRIDE: tl.constexpr, CAUSAL: tl.constexpr, TILE_M: tl.constexpr,
    TILE_N: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """One row of blocks: rescale its partial sums and add them up, STEP columns at a time."""
    GROUPS: tl.constexpr = BLOCK_SIZE // STRIDE
    COLUMNS: tl.constexpr = TILE_N // GROUPS
    block_row, local_head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    key_length = Sk
    if key_lengths_ptr is not None:
        key_length = tl.load(key_lengths_ptr + (first_head + local_head) // H)
    groups = block_row * GROUPS + tl.arange(0, GROUPS)
    ends = _ends(groups, key_length, Sq, Sk, STRIDE, CAUSAL)
    rows = local_head * tiles_m * TILE_M + groups
    partial_ptrs = partial_ptr + rows[:, None] * (tiles_n * COLUMNS)
    maxima_ptrs = maxima_ptr + rows[:, None] * tiles_n
    offsets = tl.arange(0, STEP)
    block_end = tl.maximum(tl.max(ends, axis=0), 0)
    # Columns that no query of the row sees were not computed.
    seen_columns = tl.cdiv(block_end, BLOCK_SIZE)
    seen_tiles = tl.cdiv(seen_columns, COLUMNS)

    # [GROUPS, STEP], reduced once: Triton 3.7 fails on a reduction in a loop whose result has two
    # uses.
    highest = tl.full([GROUPS, STEP], _LOWEST, dtype=tl.float32)
    for first in tl.range(0, seen_tiles, STEP):
        tiles = (first + offsets)[None, :]
        maxima = tl.load(maxima_ptrs + tiles, mask=tiles < seen_tiles, other=_LOWEST)
        highest = tl.maximum(highest, maxima)
    # [GROUPS, 1]
    row_maximum = tl.max(highest, axis=1)[:, None]
    sums = tl.zeros([GROUPS, STEP], dtype=tl.float32)
    for first in tl.range(0, seen_columns, STEP):
        columns = (first + offsets)[None, :]
        seen = columns < seen_columns
        partial = tl.load(partial_ptrs + columns, mask=seen, other=0.0)
        maxima = tl.load(maxima_ptrs + columns // COLUMNS, mask=seen, other=_LOWEST)
        sums += partial * tl.exp2(maxima - row_maximum)
    row_sum = tl.sum(sums, axis=1)

    seeing = tl.sum((ends > 0).to(tl.int32), axis=0)
    share = tl.where(ends > 0, 1.0 / tl.where(ends > 0, row_sum, 1.0), 0.0)
    share = share / tl.maximum(seeing, 1).to(tl.float32)
    scores_ptr += ((first_head + local_head) * Nq + block_row) * Nk
    for first in tl.range(0, seen_columns, STEP):
        columns = (first + offsets)[None, :]
        seen = columns < seen_columns
        partial = tl.load(partial_ptrs + columns, mask=seen, other=0.0)
        maxima = tl.load(maxima_ptrs + columns // COLUMNS, mask=seen, other=_LOWEST)
        mass = partial * tl.exp2(maxima - row_maximum) * share[:, None]
        # [STEP]
        scores = tl.maximum(
            tl.sum(mass, axis=0), _SMALLEST_NORMAL, propagate_nan=tl.PropagateNan.ALL
        )
        tl.store(scores_ptr + first + offsets, scores, mask=first + offsets < seen_columns)
    for first in tl.range(seen_columns, Nk, STEP):
        tl.store(scores_ptr + first + offsets, 0.0, mask=first + offsets < Nk)


def _describe(tensor: Tensor, stride: int, tile_s: int, tile_k: int) -> TensorDescriptor:
    """Whole groups of ``stride`` tokens as `[B, H, stride, groups, D]`."""
    B, H, S, D = tensor.shape
    stride_b, stride_h, stride_s, _ = tensor.stride()
    return TensorDescriptor(
        tensor,
        [B, H, stride, S // stride, D],
        [stride_b, stride_h, stride_s, stride_s * stride, 1],
        [1, 1, 1, tile_s, tile_k],
    )


def unsupported_reasons(
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    block_size: int,
    stride: int,
    *,
    float8: bool = False,
) -> list[str]:
    """Every reason why `antidiagonal_scores` cannot run such inputs, each with its remedy."""
    reasons = kernel_unsupported_reasons(device, dtype, head_dim, block_size)
    if float8 and not reasons and not INTERPRETING:
        major, minor = torch.cuda.get_device_capability(device)
        if (major, minor) < (8, 9):
            reasons.append(
                "8-bit products need compute capability 8.9 or more, "
                f"{device} has {major}.{minor}; score exactly."
            )
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
    float8: bool = False,
) -> Tensor:
    """Score the blocks of the attention matrix by their antidiagonals (arXiv:2503.16428, 2.1).

    Args:
        query: `[B, H, Sq, D]`, any strides.
        key: `[B, Hkv, Sk, D]`, Hkv dividing H, same dtype and device, any strides.
        block_size: Tokens in a block, 64 or 128.
        stride: Tokens in a group, a power of two that divides ``block_size``.
        causal: Whether query t sees keys up to t + Sk - Sq only.
        key_lengths: Valid keys of each item, int32 `[B]` on the same device, or None for all.
        scale: Softmax scale.
        float8: Whether to round query and key to 8 bits, with one scale for each group. A mean of
            the keys is subtracted first, which does not change a softmax over the keys.

    Returns:
        float32 `[B, H, Nq, Nk]`. A row sums to 1 over its valid blocks, none of which is 0; it is
        all 0 if its queries see no key. NaN or inf in the inputs makes the valid blocks of the
        rows they reach NaN.
    """
    B, H, Sq, D = query.shape
    Sk = key.shape[2]
    groups = block_size // stride
    assert block_size == groups * stride, (block_size, stride)
    query, key = with_unit_stride(query), with_unit_stride(key)
    query_scales = key_scales = None
    if float8:
        shift = sampled_mean(key, block_size, key_lengths)
        query, query_scales = quantize_groups(query, stride)
        key, key_scales = quantize_groups(key, stride, lengths=key_lengths, shift=shift)
    Nq, Nk = triton.cdiv(Sq, block_size), triton.cdiv(Sk, block_size)
    tiles = choose_tiles(query, key, groups)
    tiles_m, tiles_n = (
        triton.cdiv(S, tile * stride) for S, tile in ((Sq, tiles.tile_m), (Sk, tiles.tile_n))
    )
    rows, pitch = tiles_m * tiles.tile_m, tiles_n * (tiles.tile_n // groups)
    passes = triton.cdiv(B * H, max(1, _SCRATCH_BYTES // (rows * pitch * 4)))
    # Heads are divided evenly over the passes, which needs the least scratch.
    heads = triton.cdiv(B * H, passes)
    single = functools.partial(torch.empty, dtype=torch.float32, device=query.device)
    scores, partial, maxima = (
        single(B, H, Nq, Nk),
        single(heads, rows, pitch),
        single(heads, rows, tiles_n),
    )
    # Per-item key lengths can cut any group, except after quantisation, which fills cut groups.
    descriptors = tiles.descriptors and (key_lengths is None or float8)
    programs = program_count(query.device, tiles)
    with torch.cuda.device_of(query):
        for first_head in range(0, B * H, heads):
            num_heads = min(heads, B * H - first_head)
            for launch in rectangles(Sq, Sk, stride, tiles, descriptors):
                listed, num_tiles = None, launch.num_m * launch.num_n
                if causal:
                    listed = seen_tiles(launch, Sq, Sk, stride, tiles, query.device)
                    num_tiles = len(listed)
                if num_tiles == 0:
                    continue
                turns = num_heads * num_tiles
                sources = query, key
                if launch.descriptors:
                    sources = (
                        _describe(query, stride, tiles.tile_m, tiles.tile_k),
                        _describe(key, stride, tiles.tile_n, tiles.tile_k),
                    )
                _partial_sums_kernel[(min(programs, turns),)](
                    *sources, query_scales, key_scales, partial, maxima, key_lengths,
                    listed, *query.stride()[:3], *key.stride()[:3],
                    first_head, num_heads, H, H // key.shape[1], Sq, Sk, num_tiles,
                    *launch[:4], scale / stride * math.log2(math.e),
                    HEAD_DIM=D, BLOCK_SIZE=block_size, STRIDE=stride, CAUSAL=causal,
                    TILE_M=tiles.tile_m, TILE_N=tiles.tile_n, TILE_K=tiles.tile_k,
                    RASTER=tiles.raster, DESCRIPTORS=launch.descriptors, INPUT_PRECISION="ieee",
                    num_warps=tiles.num_warps, num_stages=tiles.num_stages,
                )  # fmt: skip
            _block_scores_kernel[(Nq, num_heads)](
                scores, partial, maxima, key_lengths,
                first_head, H, Sq, Sk, Nq, Nk, tiles_m, tiles_n,
                BLOCK_SIZE=block_size, STRIDE=stride, CAUSAL=causal, TILE_M=tiles.tile_m,
                TILE_N=tiles.tile_n, STEP=128, num_warps=4,
            )  # fmt: skip
    return scores
