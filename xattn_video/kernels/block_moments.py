"""The mean key and value of every block, and the covariance of its keys with its values.

Each program handles one block and reads its keys and values once.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from xattn_video.kernels.block_sparse_forward import load_rows
from xattn_video.kernels.support import with_unit_stride


@triton.jit(do_not_specialize=["H", "N"])
def _block_moments_kernel(
    key_ptr, value_ptr, mean_key_ptr, mean_value_ptr, covariance_ptr, norm_ptr,
    stride_kb, stride_kh, stride_ks, stride_vb, stride_vh, stride_vs, H, N,
    HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    NORMS: tl.constexpr,
):  # fmt: skip
    """One block of one head."""
    block, head_of_all = tl.program_id(0), tl.program_id(1)
    batch, head = (head_of_all // H).to(tl.int64), (head_of_all % H).to(tl.int64)
    key = load_rows(
        key_ptr + batch * stride_kb + head * stride_kh, stride_ks, block * BLOCK_SIZE, 0,
        BLOCK_SIZE, HEAD_DIM, PADDED_DIM, False,
    )  # fmt: skip
    value = load_rows(
        value_ptr + batch * stride_vb + head * stride_vh, stride_vs, block * BLOCK_SIZE, 0,
        BLOCK_SIZE, HEAD_DIM, PADDED_DIM, False,
    )  # fmt: skip
    columns = tl.arange(0, PADDED_DIM)
    mean_key = tl.sum(key.to(tl.float32), axis=0) / BLOCK_SIZE
    mean_value = tl.sum(value.to(tl.float32), axis=0) / BLOCK_SIZE
    # [PADDED_DIM, PADDED_DIM]
    products = tl.dot(tl.trans(key), value, input_precision="ieee") / BLOCK_SIZE
    covariance = products - mean_key[:, None] * mean_value[None, :]
    number = head_of_all.to(tl.int64) * N + block
    if NORMS:
        tl.store(norm_ptr + number, tl.sqrt(tl.sum(covariance * covariance)))
    else:
        places = number * HEAD_DIM + columns
        dtype = mean_key_ptr.dtype.element_ty
        tl.store(mean_key_ptr + places, mean_key.to(dtype), mask=columns < HEAD_DIM)
        tl.store(mean_value_ptr + places, mean_value.to(dtype), mask=columns < HEAD_DIM)
        places = number * HEAD_DIM * HEAD_DIM + columns[:, None] * HEAD_DIM + columns[None, :]
        square = (columns < HEAD_DIM)[None, :] & (columns < HEAD_DIM)[:, None]
        tl.store(covariance_ptr + places, covariance.to(dtype), mask=square)


def block_moments(
    key: Tensor, value: Tensor, block_size: int, num_blocks: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean keys and values `[B, H, N, D]` and covariances `[B, H, N, D, D]` of the first N blocks.

    Args:
        key, value: `[B, H, S, D]`, S at least N * block_size.
        block_size: Tokens in a block.
        num_blocks: N.
    """
    B, H, _, head_dim = key.shape
    mean_keys, mean_values = key.new_empty(2, B, H, num_blocks, head_dim).unbind()
    covariances = key.new_empty(B, H, num_blocks, head_dim, head_dim)
    _launch(key, value, block_size, num_blocks, (mean_keys, mean_values, covariances, None))
    return mean_keys, mean_values, covariances


def covariance_norms(key: Tensor, value: Tensor, block_size: int, num_blocks: int) -> Tensor:
    """The Frobenius norm of the covariance of each of the first N blocks, float32 `[B, H, N]`."""
    norms = key.new_empty(*key.shape[:2], num_blocks, dtype=torch.float32)
    _launch(key, value, block_size, num_blocks, (None, None, None, norms))
    return norms


def _launch(
    key: Tensor,
    value: Tensor,
    block_size: int,
    num_blocks: int,
    results: tuple[Tensor | None, ...],
) -> None:
    key, value = with_unit_stride(key), with_unit_stride(value)
    B, H, _, head_dim = key.shape
    with torch.cuda.device_of(key):
        _block_moments_kernel[(num_blocks, B * H)](
            key,
            value,
            *results,
            *key.stride()[:3],
            *value.stride()[:3],
            H,
            num_blocks,
            HEAD_DIM=head_dim,
            PADDED_DIM=triton.next_power_of_2(head_dim),
            BLOCK_SIZE=block_size,
            NORMS=results[-1] is not None,
            num_warps=4,
        )
