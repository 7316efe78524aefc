"""The paper's kernel: mit-han-lab's Block-Sparse-Attention package, where it is installed.

The kernel is based on FlashAttention 2. This adapter was written from the documented interface
and has not been run against the package, so its results are checked on first use.
"""

import functools
import importlib.util
from itertools import accumulate

import torch
from torch import Tensor

from xattn_video.backends.probe import check_on_small_problem
from xattn_video.kernels.support import cuda_unsupported_reasons
from xattn_video.ops.problem import AttentionInputs, Problem

NAME = "block_sparse_attn"

_BLOCK_SIZE = 128
_DTYPES = (torch.float16, torch.bfloat16)
_HEAD_DIMS = (32, 64, 128)
_REMEDY = "build another version of Block-Sparse-Attention, or use backend triton."


def unsupported_reasons(problem: Problem) -> list[str]:
    """Every reason why the kernel cannot run the problem, each with its remedy."""
    reasons = []
    if importlib.util.find_spec("block_sparse_attn") is None:
        reasons.append(
            "block_sparse_attn is not installed; build it from "
            "https://github.com/mit-han-lab/Block-Sparse-Attention, or use backend triton."
        )
    reasons.extend(cuda_unsupported_reasons(problem.device))
    if problem.dtype not in _DTYPES:
        reasons.append(f"dtype must be float16 or bfloat16, got {problem.dtype}; convert inputs.")
    if problem.head_dim not in _HEAD_DIMS:
        reasons.append(
            f"head_dim must be 32, 64 or 128, got {problem.head_dim}; use backend triton."
        )
    if problem.block_size != _BLOCK_SIZE:
        reasons.append(
            f"block_size must be {_BLOCK_SIZE}, got {problem.block_size}; use {_BLOCK_SIZE}, or "
            "backend triton."
        )
    if problem.causal:
        reasons.append("causal attention is not supported; use backend triton.")
    if problem.lse:
        reasons.append(
            "the package does not return the log-sum-exp, which compensation needs; use backend "
            "triton."
        )
    return reasons


def forward(inputs: AttentionInputs, return_lse: bool = False) -> tuple[Tensor, Tensor | None]:
    """Pack the valid keys of all items; reading key lengths on the host synchronises a GPU."""
    problem = inputs.problem
    _check_kernel(problem.device, problem.dtype, problem.head_dim, inputs.grouped)
    lengths = None if inputs.key_lengths is None else inputs.key_lengths.tolist()
    block_mask = inputs.blocks.to_mask()
    query, key, value = inputs.query, inputs.key, inputs.value
    return _attend(query, key, value, block_mask, lengths, inputs.scale), None


@functools.cache
def _check_kernel(device: torch.device, dtype: torch.dtype, head_dim: int, grouped: bool) -> None:
    """Check the kernel against the formula, once for each kind of input."""

    def attend(inputs: AttentionInputs) -> tuple[Tensor, None]:
        block_mask = inputs.blocks.to_mask()
        query, key, value = inputs.query, inputs.key, inputs.value
        return _attend(query, key, value, block_mask, None, inputs.scale), None

    kind = Problem(device, dtype, head_dim, _BLOCK_SIZE)
    check_on_small_problem(NAME, attend, kind, remedy=_REMEDY, grouped=grouped)


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block_mask: Tensor,
    key_lengths: list[int] | None,
    scale: float,
) -> Tensor:
    """`[B, H, Sq, D]`, stored `[B, Sq, H, D]`."""
    from block_sparse_attn import block_sparse_attn_func

    B, H, Sq, _ = query.shape
    lengths = [key.shape[2]] * B if key_lengths is None else key_lengths
    blocks = torch.tensor([-(-length // _BLOCK_SIZE) for length in lengths], device=query.device)
    longest = -(-max(lengths) // _BLOCK_SIZE)
    valid = torch.arange(longest, device=query.device) < blocks[:, None]
    with torch.cuda.device(query.device):
        # [B * Sq, H, D]
        out: Tensor = block_sparse_attn_func(
            _pack(query, [Sq] * B),
            _pack(key, lengths),
            _pack(value, lengths),
            _boundaries([Sq] * B, query.device),
            _boundaries(lengths, query.device),
            # Each head uses its own mask; none is a streaming head.
            torch.ones(H, dtype=torch.int32, device=query.device),
            None,
            (block_mask[..., :longest] & valid[:, None, None]).contiguous(),
            Sq,
            max(lengths),
            0.0,
            softmax_scale=scale,
            is_causal=False,
        )
    return out.unflatten(0, (B, Sq)).transpose(1, 2)


def _pack(tokens: Tensor, lengths: list[int]) -> Tensor:
    """The first tokens of every item one after the other, `[B, H, S, D]` -> `[total, H, D]`."""
    tokens = tokens.transpose(1, 2)
    if all(length == tokens.shape[1] for length in lengths):
        return tokens.flatten(0, 1).contiguous()
    return torch.cat([item[:length] for item, length in zip(tokens, lengths, strict=True)])


def _boundaries(lengths: list[int], device: torch.device) -> Tensor:
    """Cumulative lengths: where each item begins and the last one ends, int32 `[B + 1]`."""
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)
