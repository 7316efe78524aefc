"""What `--report` keeps of a command: settings, versions, times, and what attention really did."""

import contextlib
import importlib.metadata
import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xattn_video import __version__
from xattn_video.pipelines.video import atomic_path

if TYPE_CHECKING:
    import torch

    from xattn_video.pipelines.generation import GenerationResult
    from xattn_video.pipelines.hunyuan_video import LoadOptions
    from xattn_video.pipelines.request import GenerationRequest


def job_record(load: "LoadOptions", fps: int, runs: list[dict[str, Any]]) -> dict[str, Any]:
    """The whole command: what its videos share, and then each of them."""
    return {**run_record(load, fps), "runs": runs}


def run_record(load: "LoadOptions", fps: int) -> dict[str, Any]:
    """Versions, device, and how the model is loaded."""
    return {
        **machine_record(load.resolved_device),
        "model": load.model,
        "dtype": str(load.resolved_dtype).removeprefix("torch."),
        "offload": load.resolved_offload,
        "vae_tiling": load.resolved_vae_tiling,
        "attention_backend": load.attention_backend,
        "fps": fps,
    }


def machine_record(device: "torch.device") -> dict[str, Any]:
    """Versions, and the name of what computes."""
    import diffusers
    import torch

    versions = {
        "xattn_video": __version__,
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
    }
    # What the backends run on.
    versions |= installed_versions(("triton", "flash-attn-4", "block-sparse-attn"))
    cuda = device.type == "cuda"
    return {
        "versions": versions,
        "device": torch.cuda.get_device_name(device) if cuda else str(device),
    }


def installed_versions(packages: Iterable[str]) -> dict[str, str]:
    """The versions of those packages that are installed."""
    versions = {}
    for package in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return versions


def generation_record(
    request: "GenerationRequest", result: "GenerationResult", video: Path
) -> dict[str, Any]:
    """One video."""
    return {
        "file": str(video),
        "prompt": request.prompt,
        "negative_prompt": request.negative_prompt,
        "seed": request.seed,
        **asdict(request.video),
        "sparse": None if request.sparse is None else request.sparse.to_dict(),
        "seconds": result.seconds,
        "dense_seconds": result.dense_seconds,
        "sparse_seconds": result.sparse_seconds,
        "seconds_per_dense_step": result.seconds_per_dense_step,
        "seconds_per_sparse_step": result.seconds_per_sparse_step,
        "peak_memory_gib": result.peak_memory_gib,
        "steps": [asdict(step) for step in result.steps],
        "report": result.report.to_dict() if result.report is not None else None,
    }


def write_json(path: Path, record: dict[str, Any]) -> None:
    """Write ``record`` to ``path``, which holds all of it or stays as it was."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
