"""The table of attention backends, and the choice of one."""

import functools
import importlib
import logging
from typing import Protocol, cast

import torch
from torch import Tensor

from xattn_video.errors import BackendUnavailableError
from xattn_video.ops.problem import AttentionInputs, Problem

logger = logging.getLogger(__name__)

BACKENDS = {
    "flash4": "xattn_video.backends.flash4",
    "triton": "xattn_video.backends.triton",
    "flex": "xattn_video.backends.flex",
    "block_sparse_attn": "xattn_video.backends.block_sparse_attn",
    "torch_gather": "xattn_video.backends.torch_gather",
}

# The order in which `auto` tries backends. Each backend refuses the GPUs that it does not support:
# flash4 refuses all but Hopper. docs/backends.md lists the resulting order by GPU family and the
# measurements. block_sparse_attn is omitted because it has not been run.
AUTO_ORDER = {
    "cuda": ("flash4", "triton", "flex", "torch_gather"),
    "cpu": ("torch_gather", "flex"),
}


class Backend(Protocol):
    """The interface of a backend module."""

    NAME: str

    def unsupported_reasons(self, problem: Problem) -> list[str]:
        """Every reason why the backend cannot run the problem, with remedies; never raises."""

    def forward(
        self, inputs: AttentionInputs, return_lse: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Attention over the listed blocks, and its log-sum-exp if requested.

        Returns:
            `[B, H, Sq, D]`, stored `[B, Sq, H, D]`, and float32 `[B, H, Sq]` or None: the natural
            logarithm of the softmax's denominator, -inf for a query that sees no key.
        """


def load_backend(name: str) -> Backend:
    """Import the backend called ``name``.

    Raises:
        ValueError: No backend has that name.
    """
    if name not in BACKENDS:
        known = ", ".join(["auto", *BACKENDS])
        raise ValueError(f"unknown attention backend {name!r}; expected one of {known}.")
    return cast(Backend, importlib.import_module(BACKENDS[name]))


def resolve_backend(name: str, problem: Problem) -> str:
    """The name of the backend that runs ``problem``; a named backend is never replaced.

    Raises:
        ValueError: No backend has that name.
        BackendUnavailableError: The backend cannot run the problem; lists every reason.
    """
    return _resolve_auto(problem) if name == "auto" else _resolve_named(name, problem)


# Cached, because every layer of every step calls it and looking for a package takes as long as a
# few kernel launches. Refusals are not cached.
@functools.lru_cache(maxsize=256)
def _resolve_named(name: str, problem: Problem) -> str:
    reasons = load_backend(name).unsupported_reasons(problem)
    if reasons:
        raise BackendUnavailableError(name, reasons)
    return name


# Cached, so that each choice is also logged only once.
@functools.lru_cache(maxsize=256)
def _resolve_auto(problem: Problem) -> str:
    refused: list[str] = []
    for name in AUTO_ORDER.get(problem.device.type, ("torch_gather",)):
        reasons = load_backend(name).unsupported_reasons(problem)
        if not reasons:
            passed_over = f"; skipped: {'; '.join(refused)}" if refused else ""
            logger.info("attention backend %r chosen for %s%s", name, problem, passed_over)
            return name
        refused.extend(f"{name}: {reason}" for reason in reasons)
    raise BackendUnavailableError("auto", refused)


def available_backends(
    device: torch.device | str | None = None,
    *,
    dtype: torch.dtype | None = None,
    head_dim: int = 128,
    block_size: int = 128,
) -> dict[str, list[str]]:
    """Every backend with the reasons why it cannot run; an empty list means that it can.

    Args:
        device: Where to run. None means a CUDA device if there is one, else the CPU.
        dtype: None means bfloat16 on CUDA and float32 elsewhere.
        head_dim: Size of a head.
        block_size: Tokens in a block.

    Returns:
        {backend: reasons}, each reason with its remedy.

    Raises:
        ValueError, TypeError: An argument is out of range or of a wrong type.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(device)
    except (TypeError, RuntimeError) as error:
        raise TypeError(
            f'device must be a torch.device or its name, such as "cuda", got {device!r}.'
        ) from error
    if dtype is not None and not isinstance(dtype, torch.dtype):
        raise TypeError(f"dtype must be a torch.dtype, such as torch.float16, got {dtype!r}.")
    for name, size in (("head_dim", head_dim), ("block_size", block_size)):
        if isinstance(size, bool) or not isinstance(size, int):
            raise TypeError(f"{name} must be an int, such as 128, got {size!r}.")
        if size < 1:
            raise ValueError(f"{name} must be at least 1, got {size}; try 128.")
    if dtype is None:
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    problem = Problem(device=device, dtype=dtype, head_dim=head_dim, block_size=block_size)
    return {name: load_backend(name).unsupported_reasons(problem) for name in BACKENDS}
