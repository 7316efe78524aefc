"""flash-attn-4's block-sparse kernel for Hopper (CuTe DSL), checked on first use."""

import functools

import torch
from torch import Tensor

from xattn_video.backends.probe import check_on_small_problem
from xattn_video.kernels import flash_attention_4
from xattn_video.ops.problem import AttentionInputs, Problem

NAME = "flash4"

_BLOCK_SIZE = 128
_REMEDY = 'pip install --upgrade "xattn-video[hopper]", or use backend triton.'


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
    if problem.ragged:
        reasons.append(
            "key lengths per item of the batch are not supported; cut key and value to one "
            "length and pass no key_lengths, run the items one by one, or use backend triton."
        )
    return reasons


def forward(inputs: AttentionInputs, return_lse: bool = False) -> tuple[Tensor, Tensor | None]:
    """Walk the lists of kept blocks."""
    problem = inputs.problem
    _check_kernel(problem.device, problem.dtype, problem.head_dim, inputs.grouped, problem.causal)
    out, lse = _attend(inputs)
    # The kernel always computes it.
    return out, lse if return_lse else None


def _attend(inputs: AttentionInputs) -> tuple[Tensor, Tensor]:
    return flash_attention_4.block_sparse_forward(
        inputs.query,
        inputs.key,
        inputs.value,
        inputs.blocks.counts,
        inputs.blocks.indices,
        block_size=_BLOCK_SIZE,
        causal=inputs.causal,
        scale=inputs.scale,
    )


@functools.cache
def _check_kernel(
    device: torch.device, dtype: torch.dtype, head_dim: int, grouped: bool, causal: bool
) -> None:
    """Check the kernel against the formula, once for each kind of input."""
    kind = Problem(device, dtype, head_dim, _BLOCK_SIZE, causal, lse=True)
    check_on_small_problem(NAME, _attend, kind, remedy=_REMEDY, grouped=grouped)
