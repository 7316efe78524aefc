"""Which inputs the Triton kernels can run; importable without Triton."""

import functools
import importlib.util
import os
import shutil

import torch
from torch import Tensor

# Triton also reads this when a kernel is decorated, so a later change has no effect on either.
INTERPRETING = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
BLOCK_SIZES = (64, 128)
LARGEST_HEAD_DIM = 256


def kernel_unsupported_reasons(
    device: torch.device, dtype: torch.dtype, head_dim: int, block_size: int
) -> list[str]:
    """Why no kernel of this package can run the inputs, each reason with its remedy."""
    reasons = device_unsupported_reasons(device)
    if INTERPRETING and dtype == torch.bfloat16:
        reasons.append(
            "Triton's interpreter computes bfloat16 wrongly; use float32 or float16, or unset "
            "TRITON_INTERPRET on a GPU."
        )
    if dtype not in DTYPES:
        reasons.append(f"dtype must be float32, float16 or bfloat16, got {dtype}; convert inputs.")
    if head_dim % 16 or not 16 <= head_dim <= LARGEST_HEAD_DIM:
        reasons.append(
            f"head_dim must be a multiple of 16 from 16 to {LARGEST_HEAD_DIM}, got {head_dim}; "
            "use backend torch_gather."
        )
    if block_size not in BLOCK_SIZES:
        reasons.append(
            f"block_size must be 64 or 128, got {block_size}; use one of these, or backend "
            "torch_gather."
        )
    return reasons


@functools.cache
def is_installed(module: str) -> bool:
    """Whether a module is installed; cached, because every layer of every step calls this."""
    return importlib.util.find_spec(module) is not None


def device_unsupported_reasons(device: torch.device) -> list[str]:
    """Why Triton cannot run on the device, each reason with its remedy."""
    reasons = []
    if not is_installed("triton"):
        reasons.append("triton is not installed; pip install triton (Linux only).")
    if not INTERPRETING:
        reasons.extend(_compiler_reasons(device))
    return reasons


def _compiler_reasons(device: torch.device) -> list[str]:
    """Why Triton cannot compile for the device."""
    if device.type != "cuda":
        return [
            f'the device must be CUDA, got {device}; use a CUDA GPU, backend "auto", or set '
            "TRITON_INTERPRET=1 before the first import to interpret the kernels, slowly."
        ]
    return cuda_unsupported_reasons(device) + c_compiler_reasons()


def c_compiler_reasons() -> list[str]:
    """Why Triton cannot build the launchers of its kernels, with the remedy."""
    if has_c_compiler():
        return []
    return ["no C compiler was found; install gcc or clang, or set CC to one."]


@functools.cache
def has_c_compiler() -> bool:
    """Whether Triton finds a C compiler; cached, because every layer of every step calls this."""
    return "CC" in os.environ or any(shutil.which(name) for name in ("gcc", "clang"))


def cuda_unsupported_reasons(device: torch.device) -> list[str]:
    """Why no current CUDA kernel can run on the device, with the remedy."""
    if device.type != "cuda":
        return [f'the device must be CUDA, got {device}; use a CUDA GPU, or backend "auto".']
    if not torch.cuda.is_available():
        return [f"no CUDA device is present for {device}; use a machine with a GPU, or the CPU."]
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        return [
            f"compute capability must be 8.0 or more, {device} has {major}.{minor}; use backend "
            "torch_gather."
        ]
    return []


def nvidia_capability(device: torch.device) -> tuple[int, int] | None:
    """Compute capability of an NVIDIA GPU; None for an AMD GPU, which numbers differently."""
    return None if torch.version.hip else torch.cuda.get_device_capability(device)


def with_unit_stride(tensor: Tensor) -> Tensor:
    """The tensor if its last dimension is dense, as the kernels need; else a copy that is."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def fits_descriptor(tensor: Tensor) -> bool:
    """Whether TMA can load from it: the base and every stride are multiples of 16 bytes."""
    size = tensor.element_size()
    whole = [stride > 0 and stride * size % 16 == 0 for stride in tensor.stride()[:3]]
    return tensor.data_ptr() % 16 == 0 and all(whole)
