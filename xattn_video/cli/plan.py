"""`xattn-video plan`: estimates a run before any weight is loaded."""

import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from xattn_video.options.command import AsJson, command
from xattn_video.options.groups import loading, sparse_settings, video_settings
from xattn_video.pipelines.request import VideoSettings
from xattn_video.policy.settings import SparseSettings
from xattn_video.reporting.console import output_console, print_labelled, print_warning
from xattn_video.reporting.tables import Table

if TYPE_CHECKING:
    from xattn_video.measure.expected_seconds import ExpectedSeconds
    from xattn_video.pipelines.loading import LoadOptions
    from xattn_video.pipelines.memory import MemoryEstimate
    from xattn_video.pipelines.run_plan import RunPlan, SpeedupBound

_LOADING = ("model", "dtype", "device", "offload")
_VIDEO = ("height", "width", "num_frames", "num_inference_steps", "true_cfg_scale")


@command
def plan(
    load: Annotated["LoadOptions", loading(*_LOADING, elsewhere=True)],
    video: Annotated[VideoSettings, video_settings(*_VIDEO)],
    sparse: Annotated[SparseSettings | None, sparse_settings()],
    as_json: AsJson = False,
) -> None:
    """Estimate a run without loading weights: tokens, steps, memory and possible speed-up."""
    from xattn_video.measure.expected_seconds import expected_seconds
    from xattn_video.pipelines.model_shape import read_model_shape
    from xattn_video.pipelines.run_plan import plan_run
    from xattn_video.pipelines.source import find_model

    shape = read_model_shape(find_model(load.model))
    run_plan = plan_run(shape, video, sparse, load)
    expected = expected_seconds(shape, run_plan)
    if as_json:
        seconds = {"expected": None if expected is None else expected.to_dict()}
        typer.echo(json.dumps(run_plan.to_dict() | seconds, indent=2))
    else:
        print_plan(run_plan, output_console(), expected)


def print_plan(
    run_plan: "RunPlan", console: Console, expected: "ExpectedSeconds | None" = None
) -> None:
    """Print a plan; its warnings go to stderr."""
    frames, rows, columns = run_plan.grid
    memory = run_plan.memory
    twice = ", two forward passes each" if run_plan.forwards_per_step > 1 else ""
    lines = {
        "tokens": f"{run_plan.video_tokens:,} video ({frames} x {rows} x {columns}) "
        f"+ up to {run_plan.text_tokens} text",
        "blocks": f"{run_plan.blocks:,} per row, {run_plan.block_size} tokens each "
        f"({run_plan.last_block_tokens} in the last)",
        "steps": f"{run_plan.dense_steps} dense, {_sparse_steps(run_plan)}{twice}, "
        f"{run_plan.layers} layers",
        "compute": f"{run_plan.dense_step_tflop:,.1f} TFLOP in a dense step, "
        f"{run_plan.attention_share:.0%} of it attention; "
        f"scoring costs {run_plan.scoring_share:.1%} of it",
        "memory": f"about {memory.peak:.1f} GiB at the peak "
        f"(an estimate: transformer {memory.transformer:.1f}, "
        f"activations {memory.activations:.1f}, text encoders {memory.text_encoders:.1f}, "
        f"VAE {memory.vae:.1f}, its decoding {memory.decoding:.1f}{_residuals(memory)}); "
        f"host about {memory.host:.1f} GiB",
        "offload": _offload(memory),
        **_shared(run_plan),
        **({} if expected is None else {"seconds": expected.describe()}),
        "device": f"{run_plan.device}, {run_plan.dtype}"
        + (", not on this machine" if not run_plan.device_is_here else ""),
        "backend": _backend(run_plan),
    }
    print_labelled(console, lines)
    if run_plan.speedup_bounds:
        console.print(
            "\nLargest possible speed-up by density (share of blocks kept), arithmetic only"
            + (":" if expected is None else ", and the expected time:")
        )
        console.print(_bounds_table(run_plan, expected).terminal(console.width), crop=False)
        console.print("* density from the paper for HunyuanVideo, not measured here")
    for warning in run_plan.warnings:
        print_warning(warning)


def _shared(run_plan: "RunPlan") -> dict[str, str]:
    """The gain of several GPUs, and what they send."""
    share = run_plan.share
    if share.num_gpus == 1:
        return {}
    return {
        "gpus": f"{share.num_gpus} generate each video together, "
        f"{run_plan.memory.peak:.1f} GiB on "
        f"each; a dense step is at most {share.dense_step_speedup:.2f}x as fast as on one GPU "
        f"(arithmetic only); each sends {share.sent_gib:.1f} GiB per step"
    }


def _sparse_steps(run_plan: "RunPlan") -> str:
    refreshed = f" ({run_plan.refresh_steps} of them refresh)" if run_plan.refresh_steps else ""
    return f"{run_plan.sparse_steps} sparse{refreshed}"


def _residuals(memory: "MemoryEstimate") -> str:
    """The memory of residuals, and whether it is part of the peak."""
    if not memory.residuals:
        return ""
    where = " in host memory instead" if memory.residuals_on_host else ""
    return f", residuals {memory.residuals:.1f}{where}"


def _offload(memory: "MemoryEstimate") -> str:
    """Which parts wait in host memory and why, and the peaks with other offloads."""
    others = [
        f"with {name} {gib:.1f} GiB (host {memory.hosts[name]:.1f})"
        for name, gib in memory.peaks.items()
        if name != memory.offload
    ]
    chosen = f"{memory.offload}, {memory.offload_reason}"
    return f"{chosen}; {', '.join(others)}" if others else memory.offload


def _backend(run_plan: "RunPlan") -> str:
    if not run_plan.sparse_steps:
        return "none, attention is dense"
    if not run_plan.device_is_here:
        return "run `xattn-video backends` on the machine with the device"
    return run_plan.backend or "no backend can run"


def _bounds_table(run_plan: "RunPlan", expected: "ExpectedSeconds | None") -> Table:
    columns: dict[str, Callable[[SpeedupBound], str]] = {
        "density": lambda bound: f"{bound.density:.3g}{'*' if bound.from_paper else ' '}",
        "sparse step": lambda bound: f"{bound.step:.2f}x",
        f"all {run_plan.steps} steps": lambda bound: f"{bound.run:.2f}x",
    }
    if expected is not None:
        columns["a video"] = lambda bound: f"{expected.total(bound.density):.0f} s"
    return Table.of(run_plan.speedup_bounds, columns, num_left=0)
