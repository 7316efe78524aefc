"""Checks another package's kernel against the formula before its results are used."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from xattn_video.errors import BackendUnavailableError

# bfloat16 stays ten times below it; dense attention in the place of sparse exceeds it far.
_LARGEST_RELATIVE_ERROR = 0.02
_BLOCK_SIZE = 128
_LENGTH = 300


def check_on_small_problem(
    name: str,
    attend: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor],
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    *,
    remedy: str,
    grouped: bool = False,
) -> None:
    """Run a backend's kernel on a small ragged problem in blocks of 128.

    Args:
        name: The backend.
        attend: Its attention, from query, key, value `[1, 2, 300, D]` and the block mask.
            Where grouped, key and value are `[1, 1, 300, D]`.
        device: Where it runs.
        dtype: Dtype of the inputs.
        head_dim: D.
        remedy: What to do if the check fails.
        grouped: Whether both query heads share one key head.

    Raises:
        BackendUnavailableError: The kernel ignores the blocks, or its result is wrong.
    """
    # The last block holds 44 keys; rows with it, without it, and with no block at all.
    mask = torch.tensor([[[1, 0, 1], [0, 1, 0], [0, 0, 1]], [[0, 1, 1], [0, 0, 0], [1, 0, 0]]])
    block_mask = mask.bool()[None].to(device)
    # On the CPU whatever the default device, as its generator asks.
    generator = torch.Generator("cpu").manual_seed(0)
    tensors = torch.randn(3, 1, 2, _LENGTH, head_dim, generator=generator, device="cpu")
    query, key, value = tensors.to(device, dtype)
    if grouped:
        key, value = key[:, :1], value[:, :1]
    found = attend(query, key, value, block_mask).float()

    query, key, value = (tensor.float().expand(1, 2, -1, -1) for tensor in (query, key, value))
    visible = block_mask.repeat_interleave(_BLOCK_SIZE, 2).repeat_interleave(_BLOCK_SIZE, 3)
    visible = visible[:, :, :_LENGTH, :_LENGTH]
    logits = (query @ key.mT * head_dim**-0.5).masked_fill(~visible, float("-inf"))
    expected = logits.softmax(dim=-1).nan_to_num(0.0) @ value
    error = _relative_error(found, expected)
    if error <= _LARGEST_RELATIVE_ERROR:
        return
    dense = F.scaled_dot_product_attention(query, key, value)
    is_dense = _relative_error(found, dense) <= _LARGEST_RELATIVE_ERROR
    what = "ignores the blocks and computes dense attention" if is_dense else "is wrong"
    raise BackendUnavailableError(
        name,
        [
            f"the installed kernel {what} on {device} with {dtype} and head_dim {head_dim}"
            f"{' and a key head for several query heads' if grouped else ''} "
            f"(relative error {error:.2g} in a check on first use); {remedy}"
        ],
    )


def _relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())
