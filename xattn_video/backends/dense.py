"""The fastest dense kernel on a Hopper GPU, used unless the user chose one."""

import functools
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from xattn_video.kernels import flash_attention_4

DenseKernel = Literal["flash4", "cudnn"]

# On Hopper, PyTorch tries FlashAttention 2 first, which takes 1.6 times as long as cuDNN.
_SDPA_PRIORITY = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]


@functools.lru_cache(maxsize=64)
def fastest_dense_kernel(
    device: torch.device, dtype: torch.dtype, head_dim: int
) -> DenseKernel | None:
    """The kernel to use instead of PyTorch's choice; None to keep PyTorch's choice."""
    if device.type != "cuda" or dtype not in flash_attention_4.DTYPES:
        return None
    if not flash_attention_4.unsupported_reasons(device, dtype, head_dim):
        return "flash4"
    return "cudnn" if torch.cuda.get_device_capability(device)[0] == 9 else None


def attend_with(kernel: DenseKernel, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Dense attention on `[B, S, H, D]` without a mask; torch.compile must not trace it."""
    if kernel == "flash4":
        return flash_attention_4.dense_forward(query, key, value)
    # If cuDNN refuses the inputs, the next kernel runs; all are exact.
    with sdpa_kernel(_SDPA_PRIORITY, set_priority=True):
        out = F.scaled_dot_product_attention(
            query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
        )
    return out.transpose(1, 2)
