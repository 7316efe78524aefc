"""This package's Triton kernel: GPUs from compute capability 8.0, any key lengths."""

from torch import Tensor

from xattn_video.kernels.support import kernel_unsupported_reasons
from xattn_video.ops.problem import AttentionInputs, Problem

NAME = "triton"


def unsupported_reasons(problem: Problem) -> list[str]:
    """Every reason why the kernel cannot run the problem, each with its remedy."""
    return kernel_unsupported_reasons(
        problem.device, problem.dtype, problem.head_dim, problem.block_size
    )


def forward(inputs: AttentionInputs, return_lse: bool = False) -> tuple[Tensor, Tensor | None]:
    """Walk the lists of kept blocks."""
    # Imported here so that `unsupported_reasons` works without Triton.
    from xattn_video.kernels.block_sparse_forward import block_sparse_forward

    return block_sparse_forward(
        inputs.query,
        inputs.key,
        inputs.value,
        inputs.blocks.counts,
        inputs.blocks.indices,
        block_size=inputs.block_size,
        causal=inputs.causal,
        key_lengths=inputs.key_lengths,
        scale=inputs.scale,
        return_lse=return_lse,
    )
