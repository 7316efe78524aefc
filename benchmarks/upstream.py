"""Times a user's checkout of the authors' code (mit-han-lab/x-attention) next to this package.

Nothing is copied here: the checkout is imported from the user's folder. Its sparse attention needs
the `block_sparse_attn` package; without the package, only its estimate is timed.
"""

import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import Tensor

from benchmarks.results_files import AUTHORS
from xattn_video.measure.attention_cases import Case, SparseGrid
from xattn_video.measure.attention_problems import AttentionTensors
from xattn_video.measure.operator_checks import check_attention

_ATTENTION_PACKAGE = "block_sparse_attn"


def cases(tensors: AttentionTensors, settings: SparseGrid) -> Iterator[Case]:
    """Cases of the authors' estimate (scores and selection) and, with their kernel, of the whole.

    Requested thresholds are used as they are. A requested density is used as a threshold, which
    gives about that density on random tensors.
    """
    module = load()
    for stride in settings.strides:
        for tau in (*settings.thresholds, *settings.densities):
            how = {"stride": stride, "threshold": tau}
            columns = {"backend": AUTHORS, **tensors.describe(), **how}
            estimate = partial(
                module.xattn_estimate,
                tensors.query,
                tensors.key,
                block_size=128,
                stride=stride,
                threshold=tau,
                causal=False,
                chunk_size=default_chunk_size(tensors.length),
            )
            row = {"name": "scoring", **columns, "includes": "selection"}
            yield Case(row, estimate, partial(_check_estimate, tensors=tensors))
            if has_kernel():
                yield _whole(module, tensors, columns, estimate)


def _whole(
    module: Any, tensors: AttentionTensors, columns: dict[str, Any], estimate: Callable[[], Any]
) -> Case:
    """The case of the authors' operator, checked against the formula on its own selection."""
    blocks = -(-tensors.length // 128)
    mask = estimate()[1][:, :, :blocks, :blocks].bool()
    run = partial(
        module.Xattention_prefill,
        tensors.query,
        tensors.key,
        tensors.value,
        stride=columns["stride"],
        threshold=columns["threshold"],
        causal=False,
    )
    row = {"name": "xattention", **columns, "density": mask.sum().item() / mask.numel()}
    return Case(row, run, partial(check_attention, tensors=tensors, block_mask=mask))


def _check_estimate(found: tuple[Tensor, Tensor], tensors: AttentionTensors) -> float:
    """Check that every row keeps a block; scores are not compared, as they count padding."""
    blocks = -(-tensors.length // 128)
    mask = found[1][:, :, :blocks, :blocks].bool()
    if not bool(mask.any(dim=-1).all()):
        raise ValueError("x-attention's estimate keeps no block in some row.")
    return 0.0


def default_chunk_size(length: int) -> int:
    """The default chunk size of the authors' operator: 2048 from 128k tokens on, else more."""
    power = 1 << (length - 1).bit_length()
    return max(2048, min(power, (1 << 28) // power))


def has_kernel() -> bool:
    """Whether the package of the authors' attention kernel is installed."""
    return importlib.util.find_spec(_ATTENTION_PACKAGE) is not None


def find_checkouts(folders: list[Path]) -> bool:
    """Make the folders importable; returns whether x-attention is one of them."""
    for folder in folders:
        if not folder.is_dir():
            raise FileNotFoundError(f"--upstream {folder} is not a folder; clone the code there.")
        if str(folder) not in sys.path:
            sys.path.append(str(folder))
    return any((folder / "xattn" / "src" / "Xattention.py").is_file() for folder in folders)


def load() -> Any:
    """The authors' module; its estimate can run without the kernel's package."""
    if has_kernel():
        return importlib.import_module("xattn.src.Xattention")
    placeholder = ModuleType(_ATTENTION_PACKAGE)
    placeholder.block_sparse_attn_func = None  # type: ignore[attr-defined]
    sys.modules[_ATTENTION_PACKAGE] = placeholder
    try:
        return importlib.import_module("xattn.src.Xattention")
    finally:
        del sys.modules[_ATTENTION_PACKAGE]
