"""Dense causal attention of a chunk of queries, without one mask over all queries and keys."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

from xattn_video.backends.dense import fastest_dense_kernel
from xattn_video.kernels import flash_attention_4

# Entries of a mask; one for 32,768 queries and a million keys would take 32 GiB.
_LARGEST_MASK = 2**22
_FEWEST_ROWS = 128


def dense_causal_attention(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Dense attention in which query t sees keys up to t + Sk - Sq.

    Args:
        query: `[B, H, Sq, D]`.
        key, value: `[B, Hkv, Sk, D]`, Sk at least Sq; Hkv divides H.
        scale: Softmax scale.

    Returns:
        `[B, H, Sq, D]`.
    """
    if fastest_dense_kernel(query.device, query.dtype, query.shape[-1]) == "flash4":
        query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))
        out = flash_attention_4.dense_forward(query, key, value, causal=True, scale=scale)
        return out.transpose(1, 2)
    Sq, Sk = query.shape[2], key.shape[2]
    grouped = query.shape[1] != key.shape[1]
    if Sq == Sk:
        return F.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=scale, enable_gqa=grouped
        )
    if query.is_cuda and query.dtype in flash_attention_4.DTYPES:
        bias = causal_lower_right(Sq, Sk)
        return F.scaled_dot_product_attention(
            query, key, value, bias, scale=scale, enable_gqa=grouped
        )
    out = torch.empty_like(query)
    rows = max(_FEWEST_ROWS, _LARGEST_MASK // Sk)
    for start in range(0, Sq, rows):
        stop = min(start + rows, Sq)
        visible = Sk - Sq + stop
        mask = torch.ones(stop - start, visible, dtype=torch.bool, device=query.device)
        out[:, :, start:stop] = F.scaled_dot_product_attention(
            query[:, :, start:stop],
            key[:, :, :visible],
            value[:, :, :visible],
            mask.tril(visible - (stop - start)),
            scale=scale,
            enable_gqa=grouped,
        )
    return out
