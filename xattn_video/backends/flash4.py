"""flash-attn-4's block-sparse kernel for Hopper (CuTe DSL), checked when it is first used."""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from xattn_video.errors import BackendUnavailableError
from xattn_video.inputs import AttentionInputs, BlockLists, Problem
from xattn_video.kernels import flash_attention_4

NAME = "flash4"

_BLOCK_SIZE = 128
# bfloat16 stays ten times below it; dense attention in the place of sparse exceeds it far.
_LARGEST_RELATIVE_ERROR = 0.02


def unsupported_reasons(problem: Problem) -> list[str]:
    """Every reason why the kernel cannot run the problem, each with its remedy."""
    reasons = flash_attention_4.unsupported_reasons(
        problem.device, problem.dtype, problem.head_dim
    )
    if problem.block_size != _BLOCK_SIZE:
        reasons.append(
            f"block_size must be {_BLOCK_SIZE}, got {problem.block_size}; use {_BLOCK_SIZE}, or "
            "backend triton."
        )
    if problem.causal:
        reasons.append("causal attention is not supported; use backend triton.")
    if problem.ragged:
        reasons.append(
            "key lengths per item of the batch are not supported; cut key and value to one "
            "length and pass no key_lengths, run the items one by one, or use backend triton."
        )
    return reasons


def forward(inputs: AttentionInputs) -> Tensor:
    """Walk the lists of kept blocks."""
    problem = inputs.problem
    _check_kernel(problem.device, problem.dtype, problem.head_dim)
    return _attend(inputs.query, inputs.key, inputs.value, inputs.blocks, inputs.scale)


def _attend(query: Tensor, key: Tensor, value: Tensor, blocks: BlockLists, scale: float) -> Tensor:
    return flash_attention_4.block_sparse_forward(
        query, key, value, blocks.counts, blocks.indices, block_size=_BLOCK_SIZE, scale=scale
    )


@functools.cache
def _check_kernel(device: torch.device, dtype: torch.dtype, head_dim: int) -> None:
    """Hold the kernel to the formula on a small ragged problem, once for each kind of input.

    Raises:
        BackendUnavailableError: It ignores the block lists, or is wrong in another way.
    """
    generator = torch.Generator("cpu").manual_seed(0)
    # The last block holds 44 keys; rows with it, without it, and with no block at all.
    mask = torch.tensor([[[1, 0, 1], [0, 1, 0], [0, 0, 1]], [[0, 1, 1], [0, 0, 0], [1, 0, 0]]])
    block_mask = mask.bool()[None].to(device)
    # On the CPU whatever the default device, as its generator asks.
    tensors = torch.randn(3, 1, 2, 300, head_dim, generator=generator, device="cpu")
    query, key, value = tensors.to(device, dtype)
    scale = head_dim**-0.5
    found = _attend(query, key, value, BlockLists.from_mask(block_mask), scale).float()

    visible = block_mask.repeat_interleave(_BLOCK_SIZE, 2).repeat_interleave(_BLOCK_SIZE, 3)
    visible = visible[:, :, :300, :300]
    logits = (query.float() @ key.float().mT * scale).masked_fill(~visible, float("-inf"))
    expected = logits.softmax(dim=-1).nan_to_num(0.0) @ value.float()
    dense = F.scaled_dot_product_attention(query.float(), key.float(), value.float(), scale=scale)
    if not _relative_error(found, expected) <= _LARGEST_RELATIVE_ERROR:
        is_dense = _relative_error(found, dense) <= _LARGEST_RELATIVE_ERROR
        what = "ignores the block lists and computes dense attention" if is_dense else "is wrong"
        raise BackendUnavailableError(
            NAME,
            [
                f"the installed flash-attn-4 {what} on {device} with {dtype} and head_dim "
                f"{head_dim} (relative error {_relative_error(found, expected):.2g} in a check "
                'on first use); pip install --upgrade "xattn-video[hopper]", or use backend '
                "triton."
            ],
        )


def _relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())
