"""The report of `--report`: settings, versions, times, and what attention did."""

import shlex
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xattn_video.reporting.machine import machine_record

if TYPE_CHECKING:
    from xattn_video.pipelines.generation import GenerationResult
    from xattn_video.pipelines.loading import LoadOptions
    from xattn_video.pipelines.request import GenerationRequest


def typed_command() -> str:
    """The command as it was typed."""
    return shlex.join(["xattn-video", *sys.argv[1:]])


def run_record(load: "LoadOptions", fps: int) -> dict[str, Any]:
    """Versions, device, and how the model was loaded."""
    return {
        **machine_record(load.resolved_device),
        "model": load.model,
        "dtype": str(load.resolved_dtype).removeprefix("torch."),
        "offload": load.resolved_offload,
        "vae_tiling": load.resolved_vae_tiling,
        "attention_backend": load.attention_backend,
        "fps": fps,
    }


def shaping_record(load: "LoadOptions", fps: int) -> dict[str, Any]:
    """The part of `run_record` that a video depends on."""
    names = ("model", "dtype", "vae_tiling", "attention_backend", "fps")
    record = run_record(load, fps)
    return {name: record[name] for name in names}


def generation_record(
    request: "GenerationRequest", result: "GenerationResult", video: Path
) -> dict[str, Any]:
    """The record of one video."""
    return {
        "file": str(video),
        "prompt": request.prompt,
        "negative_prompt": request.negative_prompt,
        "prompt_tokens": [asdict(count) for count in result.prompt_tokens],
        "seed": request.seed,
        **asdict(request.video),
        "sparse": None if request.sparse is None else request.sparse.to_dict(),
        "seconds": result.seconds,
        "text_seconds": result.text_seconds,
        "dense_seconds": result.dense_seconds,
        "sparse_seconds": result.sparse_seconds,
        "decoding_seconds": result.decoding_seconds,
        "seconds_per_dense_step": result.seconds_per_dense_step,
        "seconds_per_sparse_step": result.seconds_per_sparse_step,
        "peak_memory_gib": result.peak_memory_gib,
        "steps": [asdict(step) for step in result.steps],
        "report": result.report.to_dict() if result.report is not None else None,
    }
