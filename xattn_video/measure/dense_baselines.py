"""The dense baselines: every installed exact kernel, and the call of stock Diffusers."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from xattn_video.kernels import flash_attention_4
from xattn_video.measure.attention_problems import AttentionTensors

STOCK = "sdpa-padding-mask"
"""The baseline equal to the attention call of the stock processor."""

# Padding of a prompt of 60 tokens (256 - 60), which the stock processor masks.
_STOCK_PADDING = 196


def dense_kernels(
    tensors: AttentionTensors,
) -> Iterator[tuple[str, Callable[[], Tensor], int]]:
    """Name, call and valid keys of each baseline.

    `STOCK` is PyTorch's own choice with the boolean mask of a padded prompt, not used for causal
    attention. All others use no mask: they see every key or, if causal, every earlier key.
    """
    query, key, value = tensors.query, tensors.key, tensors.value
    if not flash_attention_4.unsupported_reasons(query.device, query.dtype, query.shape[-1]):
        yield "flash-attn-4", partial(_flash_attention_4, tensors), tensors.length
    if query.is_cuda:
        named = {
            "cudnn": SDPBackend.CUDNN_ATTENTION,
            "flash-attn-2": SDPBackend.FLASH_ATTENTION,
        }
        for name, kernel in named.items():
            yield name, partial(_sdpa, tensors, kernel), tensors.length
    else:
        yield "sdpa", partial(_sdpa, tensors, None), tensors.length
    if tensors.causal:
        return
    mask = torch.ones(1, 1, 1, tensors.length, dtype=torch.bool, device=query.device)
    num_keys = max(1, tensors.length - _STOCK_PADDING)
    mask[..., num_keys:] = False
    masked = partial(F.scaled_dot_product_attention, query, key, value, attn_mask=mask)
    yield STOCK, masked, num_keys


def best_dense(rows: Iterable[dict[str, Any]]) -> dict[str, Any] | None:
    """The row of the fastest dense kernel that uses no mask."""
    dense = [row for row in rows if row["name"] == "dense" and row["backend"] != STOCK]
    return min(dense, key=lambda row: float(row["latency_ms"]), default=None)


def _sdpa(tensors: AttentionTensors, kernel: SDPBackend | None) -> Tensor:
    context: AbstractContextManager[None] = sdpa_kernel(kernel) if kernel else nullcontext()
    query, key, value = tensors.query, tensors.key, tensors.value
    grouped = query.shape[1] != key.shape[1]
    with context:
        return F.scaled_dot_product_attention(
            query, key, value, is_causal=tensors.causal, enable_gqa=grouped
        )


def _flash_attention_4(tensors: AttentionTensors) -> Tensor:
    query, key, value = (
        tensor.transpose(1, 2) for tensor in (tensors.query, tensors.key, tensors.value)
    )
    out = flash_attention_4.dense_forward(query, key, value, causal=tensors.causal)
    return out.transpose(1, 2)
