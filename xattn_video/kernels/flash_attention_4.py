"""The kernels of the flash-attn-4 package on Hopper; importable without that package."""

import importlib.metadata
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from xattn_video.kernels.support import cuda_unsupported_reasons

DTYPES = (torch.float16, torch.bfloat16)
# Head sizes for which the block-sparse Hopper kernel uses tiles of 128 x 128.
HEAD_DIMS = (64, 128)
# Modules of its dependencies.
_IMPORTS = ("cutlass", "quack", "einops")


def unsupported_reasons(device: torch.device, dtype: torch.dtype, head_dim: int) -> list[str]:
    """Why neither kernel can run the inputs, each reason with its remedy."""
    reasons = []
    try:
        importlib.metadata.version("flash-attn-4")
    except importlib.metadata.PackageNotFoundError:
        reasons.append('flash-attn-4 is not installed; pip install "xattn-video[hopper]".')
    else:
        lacking = [name for name in _IMPORTS if find_spec(name) is None]
        if lacking:
            reasons.append(
                f"flash-attn-4 is installed without {', '.join(lacking)}; "
                'pip install "xattn-video[hopper]".'
            )
    no_cuda = cuda_unsupported_reasons(device)
    reasons.extend(no_cuda)
    if not no_cuda:
        major, minor = torch.cuda.get_device_capability(device)
        # On 8.x flash-attn-4 silently ignores the block lists; on 10.x it needs other block sizes.
        if major != 9:
            reasons.append(
                f"compute capability must be 9.x (Hopper), {device} has {major}.{minor}; use "
                "backend triton."
            )
    if dtype not in DTYPES:
        reasons.append(f"dtype must be float16 or bfloat16, got {dtype}; convert inputs.")
    if head_dim not in HEAD_DIMS:
        reasons.append(f"head_dim must be 64 or 128, got {head_dim}; use backend triton.")
    return reasons


def dense_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """Dense attention on `[B, S, H, D]`; causal attention is aligned at the end."""
    from flash_attn.cute.interface import flash_attn_func

    with torch.cuda.device(query.device):
        out: Tensor = flash_attn_func(
            query, key, value, softmax_scale=scale, causal=causal, return_lse=True
        )[0]
    return out


def block_sparse_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    counts: Tensor,
    indices: Tensor,
    *,
    block_size: int,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Attention over the listed blocks.

    Args:
        query: `[B, H, Sq, D]`.
        key: `[B, Hkv, Sk, D]`, Hkv dividing H, all of them valid.
        value: `[B, Hkv, Sk, D]`.
        counts: int32 `[B, H, Nq]`, blocks of each row.
        indices: int32 `[B, H, Nq, Nk]`, ascending, so only the last of a row may be cut by Sk.
        block_size: 128.
        causal: Whether query t sees keys up to t + Sk - Sq only. The kernel then masks every
            listed block, wherever the diagonal passes.
        scale: Softmax scale.

    Returns:
        `[B, H, Sq, D]`, stored `[B, Sq, H, D]`; 0 for a query that sees no key. And the natural
        logarithm of the softmax's denominator, float32 `[B, H, Sq]`; -inf for such a query.
    """
    from flash_attn.cute.block_sparsity import BlockSparseTensorsTorch
    from flash_attn.cute.interface import flash_attn_func

    rows = counts.shape[2]
    zeros = partial(torch.zeros, dtype=torch.int32, device=counts.device)
    lists: Any = BlockSparseTensorsTorch(
        # Blocks that need a mask function: none, but the package requires the lists.
        mask_block_cnt=zeros(1, 1, rows),
        mask_block_idx=zeros(1, 1, rows, 1),
        full_block_cnt=counts,
        full_block_idx=indices,
        block_size=(block_size, block_size),
    )
    query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))
    with torch.cuda.device(query.device):
        # The length of this tuple differs between versions; these two come first.
        out, lse = flash_attn_func(
            query,
            key,
            value,
            softmax_scale=scale,
            causal=causal,
            # By default it packs the query heads of a key head into one tile. The empty lists
            # have one head, from which it would conclude that all heads share their lists.
            pack_gqa=False,
            block_sparse_tensors=lists,
            return_lse=True,
        )[:2]
    return out.transpose(1, 2), lse
