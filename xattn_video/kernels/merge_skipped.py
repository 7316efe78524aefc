"""Adds the approximate contribution of the skipped blocks to block-sparse attention.

To merge, a program holds one block of queries, walks the mean keys of all blocks and ignores the
blocks that the row computed. Masses are relative to that of the computed blocks, known from the
log-sum-exp, so no maximum is needed.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from xattn_video.kernels.block_sparse_forward import load_rows
from xattn_video.kernels.support import with_unit_stride

# The log2 of the largest mass; sums of 928 such masses, times values, stay finite.
_LARGEST = tl.constexpr(80.0)
_LOWEST = tl.constexpr(-1e38)
_LOG2_E = tl.constexpr(math.log2(math.e))


@triton.jit(do_not_specialize=["H", "Sq", "N"])
def _merge_skipped_kernel(
    query_ptr, key_ptr, value_ptr, slope_ptr, mask_ptr, lse_ptr, out_ptr,
    stride_qb, stride_qh, stride_qs, stride_ob, stride_oh, stride_os,
    stride_mb, stride_mh, stride_mr, stride_lb, stride_lh, H, Sq, N, scale,
    HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    TILE_N: tl.constexpr, SLOPES: tl.constexpr, INPUT_PRECISION: tl.constexpr,
):  # fmt: skip
    """One block of queries of one head."""
    row = tl.program_id(0)
    batch, head = (tl.program_id(1) // H).to(tl.int64), (tl.program_id(1) % H).to(tl.int64)
    first = row * BLOCK_SIZE
    query = load_rows(
        query_ptr + batch * stride_qb + head * stride_qh, stride_qs, first, Sq,
        BLOCK_SIZE, HEAD_DIM, PADDED_DIM, True,
    )  # fmt: skip
    keys = key_ptr + (batch * H + head) * N * HEAD_DIM
    values = value_ptr + (batch * H + head) * N * HEAD_DIM
    kept_row = mask_ptr + batch * stride_mb + head * stride_mh + row.to(tl.int64) * stride_mr
    rows = first + tl.arange(0, BLOCK_SIZE)
    lse_ptrs = lse_ptr + batch * stride_lb + head * stride_lh + rows
    lse = tl.load(lse_ptrs, mask=rows < Sq, other=0.0) * _LOG2_E
    # Masses are relative to that of the computed blocks, or to 1 where there are none.
    computed = tl.where(lse > float("-inf"), 1.0, 0.0)
    lse = tl.where(lse > float("-inf"), lse, 0.0)
    total = tl.zeros([BLOCK_SIZE], tl.float32)
    mean = tl.zeros([BLOCK_SIZE, PADDED_DIM], tl.float32)
    scale_log2 = scale * _LOG2_E
    for start in tl.range(0, N, TILE_N):
        columns = start + tl.arange(0, TILE_N)
        kept = tl.load(kept_row + columns, mask=columns < N, other=1)
        key = load_rows(keys, HEAD_DIM, start, N, TILE_N, HEAD_DIM, PADDED_DIM, True)
        products = tl.dot(query, tl.trans(key), input_precision=INPUT_PRECISION)
        exponents = tl.minimum(products * scale_log2 - lse[:, None], _LARGEST)
        weights = tl.where((kept == 0)[None, :], tl.exp2(exponents), 0.0)
        total += tl.sum(weights, axis=1)
        value = load_rows(values, HEAD_DIM, start, N, TILE_N, HEAD_DIM, PADDED_DIM, True)
        if value.dtype == tl.float16:
            # Weights can leave float16's range. TF32 has the same precision.
            mean = tl.dot(weights, value.to(tl.float32), mean, input_precision="tf32")
        else:
            mean = tl.dot(weights.to(value.dtype), value, mean, input_precision=INPUT_PRECISION)
    if SLOPES:
        slopes = slope_ptr + ((batch * H + head) * tl.num_programs(0) + row) * HEAD_DIM * HEAD_DIM
        slope = load_rows(
            slopes, HEAD_DIM, 0, HEAD_DIM, PADDED_DIM, HEAD_DIM, PADDED_DIM, True
        )  # fmt: skip
        mean += tl.dot(query, slope, input_precision=INPUT_PRECISION) * (scale * total)[:, None]
    dims = tl.arange(0, PADDED_DIM)
    out_ptrs = out_ptr + batch * stride_ob + head * stride_oh
    out_ptrs = out_ptrs + rows.to(tl.int64)[:, None] * stride_os + dims[None, :]
    inside = (rows < Sq)[:, None] & (dims < HEAD_DIM)[None, :]
    out = tl.load(out_ptrs, mask=inside, other=0.0).to(tl.float32)
    mass = tl.maximum(computed + total * BLOCK_SIZE, 1e-30)
    out = (out * computed[:, None] + mean * BLOCK_SIZE) / mass[:, None]
    tl.store(out_ptrs, out.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["H", "N"])
def _softmax_of_skipped_kernel(
    product_ptr, mask_ptr, weight_ptr, stride_mb, stride_mh, stride_mr, H, N, scale,
    PADDED_N: tl.constexpr,
):  # fmt: skip
    """One row of blocks of one head."""
    row, head_of_all = tl.program_id(0), tl.program_id(1).to(tl.int64)
    batch, head = head_of_all // H, head_of_all % H
    columns = tl.arange(0, PADDED_N)
    kept_row = mask_ptr + batch * stride_mb + head * stride_mh + row.to(tl.int64) * stride_mr
    skipped = tl.load(kept_row + columns, mask=columns < N, other=1) == 0
    places = (head_of_all * tl.num_programs(0) + row) * N + columns
    products = tl.load(product_ptr + places, mask=skipped, other=0.0).to(tl.float32)
    products = tl.where(skipped, products * (scale * _LOG2_E), _LOWEST)
    weights = tl.where(skipped, tl.exp2(products - tl.max(products, axis=0)), 0.0)
    weights = weights / tl.maximum(tl.sum(weights, axis=0), 1e-30)
    tl.store(weight_ptr + places, weights.to(weight_ptr.dtype.element_ty), mask=columns < N)


def softmax_of_skipped(products: Tensor, kept: Tensor, scale: float) -> Tensor:
    """The softmax over the skipped blocks of each row, `[B, H, Nq, N]`; 0 where none is skipped.

    Args:
        products: `[B, H, Nq, N]`, contiguous.
        kept: bool `[B, H, Nq, N]`, True = not skipped; the last stride is 1.
        scale: Softmax scale.
    """
    B, H, rows, N = products.shape
    weights = torch.empty_like(products)
    with torch.cuda.device_of(products):
        _softmax_of_skipped_kernel[(rows, B * H)](
            products,
            kept.view(torch.uint8),
            weights,
            *kept.stride()[:3],
            H,
            N,
            scale,
            PADDED_N=triton.next_power_of_2(N),
        )
    return weights


def merge_skipped(
    query: Tensor,
    mean_keys: Tensor,
    mean_values: Tensor,
    slopes: Tensor | None,
    kept: Tensor,
    lse: Tensor,
    out: Tensor,
    *,
    block_size: int,
    scale: float,
) -> None:
    """Merge the skipped blocks into the output of block-sparse attention, in place.

    Args:
        query, out: `[B, H, Sq, D]`; the last stride is 1.
        mean_keys, mean_values: `[B, H, N, D]`, of the first N blocks; only these are merged.
        slopes: `[B, H, Nq, D, D]` or None; query x slope x ``scale`` is added to the mean value.
        kept: bool `[B, H, Nq, N]`, True = computed; the last stride is 1.
        lse: float32 `[B, H, Sq]`, log-sum-exp over the computed blocks; the last stride is 1.
        block_size: Tokens in each of the N blocks.
        scale: Softmax scale.
    """
    query, lse = with_unit_stride(query), with_unit_stride(lse)
    mean_keys, mean_values = mean_keys.contiguous(), mean_values.contiguous()
    if slopes is not None:
        slopes = slopes.contiguous()
    B, H, Sq, head_dim = query.shape
    # Large tiles fit in shared memory; float16 is widened there.
    fits = query.dtype == torch.bfloat16
    with torch.cuda.device_of(query):
        _merge_skipped_kernel[(-(-Sq // block_size), B * H)](
            query,
            mean_keys,
            mean_values,
            slopes,
            kept.view(torch.uint8),
            lse,
            out,
            *query.stride()[:3],
            *out.stride()[:3],
            *kept.stride()[:3],
            *lse.stride()[:2],
            H,
            Sq,
            mean_keys.shape[2],
            scale,
            HEAD_DIM=head_dim,
            PADDED_DIM=triton.next_power_of_2(head_dim),
            BLOCK_SIZE=block_size,
            TILE_N=128 if fits else 64,
            SLOPES=slopes is not None,
            INPUT_PRECISION="ieee",
            num_warps=8 if block_size == 128 else 4,
            num_stages=3 if fits else 2,
        )
