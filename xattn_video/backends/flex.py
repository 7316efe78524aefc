"""FlexAttention, compiled: PyTorch's own block-sparse kernel, on CUDA and on x86 CPUs.

It compiles once for each set of shapes, strides, dtype, block size, scale and causality (5 to 40
seconds), not again at each step, because masks and key lengths are tensors.
"""

import functools
import os
import shutil
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import flex_attention as flex
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from xattn_video.kernels.support import (
    c_compiler_reasons,
    cuda_unsupported_reasons,
    is_installed,
    nvidia_capability,
)
from xattn_video.ops.problem import AttentionInputs, Problem

NAME = "flex"

_BLOCK_SIZES = (64, 128)
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Most shapes that one process may compile for; with fullgraph, torch raises beyond it.
_RECOMPILE_LIMIT = 64


def unsupported_reasons(problem: Problem) -> list[str]:
    """Every reason why FlexAttention cannot run the problem, each with its remedy."""
    reasons = []
    if problem.device.type == "cuda":
        reasons.extend(_cuda_reasons(problem))
    elif problem.device.type == "cpu":
        reasons.extend(_cpu_reasons())
        if problem.lse:
            reasons.append(
                "FlexAttention returns no log-sum-exp on a CPU, which compensation needs; use "
                "backend torch_gather."
            )
    else:
        reasons.append(
            f"the device must be CUDA or the CPU, got {problem.device}; use backend torch_gather."
        )
    if torch._dynamo.config.disable:
        reasons.append("torch.compile is disabled; unset TORCHDYNAMO_DISABLE.")
    if problem.dtype not in _DTYPES:
        reasons.append(
            f"dtype must be float32, float16 or bfloat16, got {problem.dtype}; convert inputs."
        )
    if problem.block_size not in _BLOCK_SIZES:
        reasons.append(
            f"block_size must be 64 or 128, got {problem.block_size}; use one of these, or "
            "backend torch_gather."
        )
    return reasons


def _cuda_reasons(problem: Problem) -> list[str]:
    """Why Inductor's Triton template cannot run."""
    reasons = []
    if not is_installed("triton"):
        reasons.append("triton is not installed; pip install triton (Linux only).")
    elif os.environ.get("TRITON_INTERPRET", "0") != "0":
        reasons.append("TRITON_INTERPRET keeps Triton from compiling; unset it.")
    reasons.extend(c_compiler_reasons())
    reasons.extend(cuda_unsupported_reasons(problem.device))
    if problem.head_dim & (problem.head_dim - 1) or not 16 <= problem.head_dim <= 256:
        reasons.append(
            f"head_dim must be a power of two from 16 to 256 on CUDA, got {problem.head_dim}; use "
            "backend triton or torch_gather."
        )
    return reasons


def _cpu_reasons() -> list[str]:
    """Why Inductor's C++ template cannot run."""
    reasons = []
    capability = torch.backends.cpu.get_cpu_capability()
    if not capability.startswith("AVX"):
        reasons.append(
            f"the CPU must have AVX2 or AVX512, got {capability}; use backend torch_gather."
        )
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        reasons.append(
            f"no C++ compiler was found ({compiler}); install g++, or set CXX before the import "
            "of torch."
        )
    return reasons


def forward(inputs: AttentionInputs, return_lse: bool = False) -> tuple[Tensor, Tensor | None]:
    """Split the lists into whole blocks and those that need a mask, and run the kernel."""
    lengths = inputs.key_lengths
    if lengths is None:
        B, _, Sk, _ = inputs.key.shape
        lengths = torch.full((B,), Sk, dtype=torch.int32, device=inputs.key.device)
    with torch._dynamo.config.patch(recompile_limit=_RECOMPILE_LIMIT):
        out, lse = _compiled()(
            inputs.query,
            inputs.key,
            inputs.value,
            *_split_lists(inputs, lengths),
            lengths,
            inputs.block_size,
            inputs.causal,
            inputs.scale,
            _kernel_options(inputs.query, inputs.block_size),
            return_lse,
        )
    # Laid out [B, Sq, H, D] whatever the strides of the query.
    return out.transpose(1, 2).contiguous().transpose(1, 2), lse


def _split_lists(inputs: AttentionInputs, lengths: Tensor) -> tuple[Tensor, ...]:
    """Counts and indices of the blocks that need a mask, then of those that are fully visible.

    Lists ascend: fully visible blocks are the beginning of each list, masked blocks its end.
    """
    counts, indices = inputs.blocks.counts, inputs.blocks.indices
    Sq, Sk = inputs.query.shape[2], inputs.key.shape[2]
    Nq, Nk = indices.shape[2:]
    # [B, 1, 1], keys that every query of the row sees.
    seen_by_all = lengths[:, None, None]
    if inputs.causal:
        first_queries = torch.arange(Nq, device=lengths.device) * inputs.block_size
        # [B, 1, Nq]
        seen_by_all = seen_by_all.minimum((first_queries + 1 + Sk - Sq).clamp(min=0))
    places = torch.arange(Nk, dtype=torch.int32, device=counts.device)
    first_masked = (seen_by_all // inputs.block_size)[..., None]
    whole = (places < counts[..., None]) & (indices < first_masked)
    whole_counts = whole.sum(dim=-1, dtype=torch.int32)
    shifted = (places + whole_counts[..., None]).clamp_(max=Nk - 1)
    return counts - whole_counts, indices.gather(-1, shifted.long()), whole_counts, indices


def _kernel_options(query: Tensor, block_size: int) -> dict[str, int | bool] | None:
    """Options of FlexAttention's template, without ROWS_GUARANTEED_SAFE: rows may be empty."""
    if not query.is_cuda:
        return None
    options: dict[str, int | bool] = {}
    if block_size < 128:
        # The default tile of 128 queries does not divide smaller blocks.
        options |= {"BLOCK_M": 64, "BLOCK_N": 64}
    if nvidia_capability(query.device) == (9, 0):
        # Inductor uses plain loads for a tensor that TMA cannot read.
        options["USE_TMA"] = True
    return options


@functools.cache
def _compiled() -> Callable[..., Any]:
    """The compiled kernel; torch keeps one program for each set of shapes and constants."""
    return torch.compile(_flex_forward, dynamic=False, fullgraph=True)


def _flex_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    masked_counts: Tensor,
    masked_indices: Tensor,
    whole_counts: Tensor,
    whole_indices: Tensor,
    key_lengths: Tensor,
    block_size: int,
    causal: bool,
    scale: float,
    kernel_options: Any,
    return_lse: bool,
) -> tuple[Tensor, Tensor | None]:
    """FlexAttention over the listed blocks, with the log-sum-exp if requested."""
    if not torch.compiler.is_compiling():
        raise RuntimeError(
            "FlexAttention ignores the block mask unless it is compiled, and torch.compile is "
            "disabled here; use another backend or allow it to compile."
        )
    Sq, Sk = query.shape[2], key.shape[2]

    def visible(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        inside = kv < key_lengths[b]
        return inside & (kv <= q + (Sk - Sq)) if causal else inside

    block_mask = BlockMask(
        seq_lengths=(Sq, Sk),
        kv_num_blocks=masked_counts,
        kv_indices=masked_indices,
        full_kv_num_blocks=whole_counts,
        full_kv_indices=whole_indices,
        # Only the backward pass needs lists by key block.
        q_num_blocks=None,
        q_indices=None,
        full_q_num_blocks=None,
        full_q_indices=None,
        BLOCK_SIZE=(block_size, block_size),
        mask_mod=visible,
    )
    options: dict[str, Any] = {}
    if return_lse:
        # torch 2.9 replaced return_lse by return_aux.
        aux = getattr(flex, "AuxRequest", None)
        options = {"return_lse": True} if aux is None else {"return_aux": aux(lse=True)}
    attended: Any = flex_attention(
        query,
        key,
        value,
        block_mask=block_mask,
        scale=scale,
        kernel_options=kernel_options,
        enable_gqa=query.shape[1] != key.shape[1],
        **options,
    )
    if not return_lse:
        return attended, None
    out, lse = attended
    return out, getattr(lse, "lse", lse)
