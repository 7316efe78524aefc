"""Block-sparse attention from lists of kept blocks.

A program holds one tile of queries and walks its row's list of key blocks; it reads no other
block. The lists ascend, so the blocks that need a mask (cut by the end of the keys or by the
diagonal) come last and have their own loop. The loop before them runs without masks.

A softmax may subtract any number instead of the maximum of its row, as long as no exponential
leaves the range of float32. A product is at most the norm of its query times the norm of the
head's longest key. If this bound is small enough, it is subtracted, and the kernel needs no
running maximum and no correction of sums. Other rows, and dtypes other than bfloat16, use an
online softmax.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from xattn_video.kernels.attention_tiles import choose_attention_tiles
from xattn_video.kernels.largest_norms import largest_norms
from xattn_video.kernels.support import with_unit_stride

# The maximum of no products; finite, so that differences of maxima are finite too.
_LOWEST = tl.constexpr(-1e38)
_LN_2 = tl.constexpr(math.log(2))
# A log2. Subtracting this much less than the bound keeps weights between 2^-120 and 2^32, so that
# neither they nor their sums leave the range of float32 and bfloat16.
_BELOW_BOUND = tl.constexpr(32.0)
_LARGEST_BOUND = tl.constexpr(76.0)
# Weights so far from 1 leave float16's range. In float32 the larger differences cost precision,
# which bfloat16 does not have in any case.
_BOUNDED_DTYPES = (torch.bfloat16,)


@triton.jit
def load_rows(
    source, stride, first, num_rows, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr, MASKED: tl.constexpr, DESCRIPTORS: tl.constexpr = False,
    batch=0, head=0,
):  # fmt: skip
    """Rows from ``first`` on of a `[num_rows, HEAD_DIM]` matrix; rows and columns beyond it are 0.

    ``source`` points to the matrix, or is a TMA descriptor `[B, H, S, HEAD_DIM]`. Without MASKED
    all rows are within the matrix.
    """
    rows = first + tl.arange(0, ROWS)
    columns = tl.arange(0, PADDED_DIM)
    if DESCRIPTORS:
        loaded = source.load([batch, head, first, 0]).reshape(ROWS, HEAD_DIM)
        if MASKED:
            # The descriptor ends with the tensor, which may go on beyond an item's own keys.
            loaded = tl.where((rows < num_rows)[:, None], loaded, 0.0)
    else:
        ptrs = source + rows.to(tl.int64)[:, None] * stride + columns[None, :]
        if PADDED_DIM != HEAD_DIM:
            inside = (columns < HEAD_DIM)[None, :]
            if MASKED:
                inside = inside & (rows < num_rows)[:, None]
            loaded = tl.load(ptrs, mask=inside, other=0.0)
        elif MASKED:
            loaded = tl.load(ptrs, mask=(rows < num_rows)[:, None], other=0.0)
        else:
            loaded = tl.load(ptrs)
    return loaded


@triton.jit
def _attend(
    accumulator, row_sum, row_maximum, is_bounded, query, key_source, value_source,
    stride_ks, stride_vs, batch, kv_head, indices_ptr, first_step, last_step,
    ends_m, key_length, last_block, scale_log2,
    HEAD_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr, TILE_N: tl.constexpr, MASKED: tl.constexpr,
    DESCRIPTORS: tl.constexpr, NUM_STAGES: tl.constexpr, INPUT_PRECISION: tl.constexpr,
):  # fmt: skip
    """Walk the listed blocks in steps of TILE_N keys; MASKED hides keys from a query's end on.

    If the products are bounded, ``row_maximum`` does not change.
    """
    PADDED_DIM: tl.constexpr = query.shape[1]
    PARTS: tl.constexpr = BLOCK_SIZE // TILE_N
    # Read one step ahead, so that no load of keys waits for its index.
    block = tl.load(indices_ptr + tl.minimum(first_step // PARTS, last_block))
    for i in tl.range(first_step, last_step, num_stages=NUM_STAGES):
        first_n = block * BLOCK_SIZE + (i % PARTS) * TILE_N
        block = tl.load(indices_ptr + tl.minimum((i + 1) // PARTS, last_block))
        # [TILE_N, PADDED_DIM]
        key = load_rows(
            key_source, stride_ks, first_n, key_length,
            TILE_N, HEAD_DIM, PADDED_DIM, MASKED, DESCRIPTORS, batch, kv_head,
        )  # fmt: skip
        # [TILE_M, TILE_N]
        products = tl.dot(query, tl.trans(key), input_precision=INPUT_PRECISION)
        visible = (first_n + tl.arange(0, TILE_N))[None, :] < ends_m[:, None]
        if MASKED:
            products = tl.where(visible, products, _LOWEST)
        if not is_bounded:
            # scale_log2 is not negative, so it can be applied after the maximum.
            new_maximum = tl.maximum(row_maximum, tl.max(products, axis=1) * scale_log2)
            correction = tl.exp2(row_maximum - new_maximum)
            row_sum *= correction
            accumulator *= correction[:, None]
            row_maximum = new_maximum
        weights = tl.exp2(products * scale_log2 - row_maximum[:, None])
        if MASKED:
            weights = tl.where(visible, weights, 0.0)
        row_sum += tl.sum(weights, axis=1)
        value = load_rows(
            value_source, stride_vs, first_n, key_length,
            TILE_N, HEAD_DIM, PADDED_DIM, MASKED, DESCRIPTORS, batch, kv_head,
        )  # fmt: skip
        accumulator = tl.dot(
            weights.to(value.dtype), value, accumulator, input_precision=INPUT_PRECISION
        )
    return accumulator, row_sum, row_maximum


@triton.jit(do_not_specialize=["H", "group_size", "Sq", "Sk", "Nq", "Nk"])
def _block_sparse_forward_kernel(
    query_source, key_source, value_source, output_ptr, counts_ptr, indices_ptr, key_lengths_ptr,
    key_norms_ptr, lse_ptr, stride_qb, stride_qh, stride_qs, stride_kb, stride_kh, stride_ks,
    stride_vb, stride_vh, stride_vs, stride_ob, stride_oh, stride_os,
    H, group_size, Sq, Sk, Nq, Nk, scale_log2,
    HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    CAUSAL: tl.constexpr, TILE_M: tl.constexpr, TILE_N: tl.constexpr, DESCRIPTORS: tl.constexpr,
    NUM_STAGES: tl.constexpr, INPUT_PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of queries, in a row of blocks, against the row's kept blocks."""
    PARTS: tl.constexpr = BLOCK_SIZE // TILE_N
    # The last rows start first: text comes last and its rows keep every block.
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    batch = tl.program_id(1) // H
    head = tl.program_id(1) % H
    kv_head = head // group_size
    b, h = batch.to(tl.int64), head.to(tl.int64)
    if not DESCRIPTORS:
        query_source += b * stride_qb + h * stride_qh
        key_source += b * stride_kb + kv_head.to(tl.int64) * stride_kh
        value_source += b * stride_vb + kv_head.to(tl.int64) * stride_vh
    output_ptr += b * stride_ob + h * stride_oh
    row = tl.program_id(1).to(tl.int64) * Nq + tile * TILE_M // BLOCK_SIZE
    indices_ptr += row * Nk
    count = tl.load(counts_ptr + row)
    key_length = Sk
    if key_lengths_ptr is not None:
        key_length = tl.load(key_lengths_ptr + b)

    offsets_m = tile * TILE_M + tl.arange(0, TILE_M)
    # [TILE_M]: a query sees the keys before its end; all queries see those before `seen_by_all`.
    ends_m = tl.zeros([TILE_M], dtype=tl.int32) + key_length
    seen_by_all = key_length
    if CAUSAL:
        ends_m = tl.minimum(ends_m, offsets_m + 1 + Sk - Sq)
        seen_by_all = tl.maximum(tl.minimum(key_length, tile * TILE_M + 1 + Sk - Sq), 0)
    # Blocks from this one on need a mask.
    first_masked = seen_by_all // BLOCK_SIZE
    unmasked = count
    last = tl.load(indices_ptr + tl.maximum(unmasked - 1, 0))
    while (unmasked > 0) & (last >= first_masked):
        unmasked -= 1
        last = tl.load(indices_ptr + tl.maximum(unmasked - 1, 0))

    query = load_rows(
        query_source, stride_qs, tile * TILE_M, Sq,
        TILE_M, HEAD_DIM, PADDED_DIM, not DESCRIPTORS, DESCRIPTORS, batch, head,
    )  # fmt: skip
    accumulator = tl.zeros([TILE_M, PADDED_DIM], dtype=tl.float32)
    row_sum = tl.zeros([TILE_M], dtype=tl.float32)
    # A log2.
    row_maximum = tl.full([TILE_M], _LOWEST, dtype=tl.float32)
    is_bounded = False
    if key_norms_ptr is not None:
        key_norm = tl.load(key_norms_ptr + b * (H // group_size) + kv_head)
        squares = query.to(tl.float32) * query.to(tl.float32)
        # [TILE_M], upper bounds of each query's products.
        bounds = tl.sqrt(tl.sum(squares, axis=1)) * key_norm * scale_log2
        is_bounded = tl.max(bounds) <= _LARGEST_BOUND
        row_maximum = tl.where(is_bounded, bounds - _BELOW_BOUND, row_maximum)
    accumulator, row_sum, row_maximum = _attend(
        accumulator, row_sum, row_maximum, is_bounded, query, key_source, value_source,
        stride_ks, stride_vs, batch, kv_head, indices_ptr, 0, unmasked * PARTS,
        ends_m, key_length, Nk - 1, scale_log2,
        HEAD_DIM, BLOCK_SIZE, TILE_N, False, DESCRIPTORS, NUM_STAGES, INPUT_PRECISION,
    )  # fmt: skip
    accumulator, row_sum, row_maximum = _attend(
        accumulator, row_sum, row_maximum, False, query, key_source, value_source,
        stride_ks, stride_vs, batch, kv_head, indices_ptr, unmasked * PARTS, count * PARTS,
        ends_m, key_length, Nk - 1, scale_log2,
        HEAD_DIM, BLOCK_SIZE, TILE_N, True, DESCRIPTORS, 1, INPUT_PRECISION,
    )  # fmt: skip

    # A query that sees no key has a sum of 0; its output is 0.
    output = accumulator / tl.where(row_sum == 0.0, 1.0, row_sum)[:, None]
    columns = tl.arange(0, PADDED_DIM)
    tl.store(
        output_ptr + offsets_m.to(tl.int64)[:, None] * stride_os + columns[None, :],
        output.to(output_ptr.dtype.element_ty),
        mask=(offsets_m < Sq)[:, None] & (columns < HEAD_DIM)[None, :],
    )
    if lse_ptr is not None:
        lse = (row_maximum + tl.log2(tl.where(row_sum == 0.0, 1.0, row_sum))) * _LN_2
        lse = tl.where(row_sum == 0.0, -float("inf"), lse)
        rows = tl.program_id(1).to(tl.int64) * Sq + offsets_m
        tl.store(lse_ptr + rows, lse, mask=offsets_m < Sq)


def block_sparse_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    counts: Tensor,
    indices: Tensor,
    *,
    block_size: int,
    causal: bool,
    key_lengths: Tensor | None,
    scale: float,
    return_lse: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Attention of every query over the key blocks listed for its row of blocks.

    Args:
        query: `[B, H, Sq, D]`, any strides.
        key: `[B, Hkv, Sk, D]`, Hkv dividing H, same dtype and device, any strides.
        value: `[B, Hkv, Sk, D]`, likewise.
        counts: Key blocks of each row, int32 `[B, H, Nq]`.
        indices: The key blocks themselves, ascending and first in each row, int32
            `[B, H, Nq, Nk]`; entries after the first ``counts`` of a row are ignored.
        block_size: Tokens in a block, 64 or 128.
        causal: Whether query t sees keys up to t + Sk - Sq only.
        key_lengths: Valid keys of each item, int32 `[B]` on the same device, or None for all.
        scale: Softmax scale, not negative.
        return_lse: Whether to return the log-sum-exp.

    Returns:
        `[B, H, Sq, D]`, stored `[B, Sq, H, D]`; 0 for a query that sees no key. And the natural
        logarithm of the softmax's denominator, float32 `[B, H, Sq]`, -inf for a query that sees
        no key; None unless requested.
    """
    B, H, Sq, D = query.shape
    Sk = key.shape[2]
    Nq, Nk = triton.cdiv(Sq, block_size), triton.cdiv(Sk, block_size)
    assert counts.shape == (B, H, Nq), (counts.shape, (B, H, Nq))
    assert indices.shape == (B, H, Nq, Nk), (indices.shape, (B, H, Nq, Nk))
    if scale < 0:
        query, scale = -query, -scale
    query, key, value = (with_unit_stride(tensor) for tensor in (query, key, value))
    counts, indices = counts.contiguous(), indices.contiguous()
    key_norms = largest_norms(key, key_lengths) if query.dtype in _BOUNDED_DTYPES else None
    output = query.new_empty(B, Sq, H, D).transpose(1, 2)
    lse = query.new_empty(B, H, Sq, dtype=torch.float32) if return_lse else None
    tiles = choose_attention_tiles(query, key, value, block_size)
    sources = query, key, value
    if tiles.descriptors:
        rows = tiles.tile_m, tiles.tile_n, tiles.tile_n
        sources = tuple(map(_descriptor, sources, rows))
    with torch.cuda.device_of(query):
        _block_sparse_forward_kernel[(triton.cdiv(Sq, tiles.tile_m), B * H)](
            *sources, output, counts, indices, key_lengths, key_norms, lse,
            *query.stride()[:3], *key.stride()[:3], *value.stride()[:3], *output.stride()[:3],
            H, H // key.shape[1], Sq, Sk, Nq, Nk, scale * math.log2(math.e),
            HEAD_DIM=D, PADDED_DIM=triton.next_power_of_2(D), BLOCK_SIZE=block_size,
            CAUSAL=causal, TILE_M=tiles.tile_m, TILE_N=tiles.tile_n,
            DESCRIPTORS=tiles.descriptors, NUM_STAGES=tiles.num_stages, INPUT_PRECISION="ieee",
            num_warps=tiles.num_warps,
        )  # fmt: skip
    return output, lse


def _descriptor(tensor: Tensor, rows: int) -> TensorDescriptor:
    """A TMA descriptor of `[B, H, S, D]` that loads ``rows`` tokens of one head."""
    return TensorDescriptor.from_tensor(tensor, [1, 1, rows, tensor.shape[-1]])
