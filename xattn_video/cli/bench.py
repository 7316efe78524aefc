"""`xattn-video bench`: measures the speed-up to expect on this machine at this size."""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from xattn_video.options.command import AsJson, command, knob
from xattn_video.options.groups import loading, sparse_subset, video_settings
from xattn_video.pipelines.request import VideoSettings
from xattn_video.policy.settings import SparseSettings
from xattn_video.reporting.console import (
    output_console,
    print_labelled,
    print_warning,
    progress_console,
)
from xattn_video.reporting.endings import ErrorsToExitCodes
from xattn_video.reporting.tables import Table, figure

if TYPE_CHECKING:
    from xattn_video.measure.speedup import Speedup
    from xattn_video.pipelines.loading import LoadOptions
    from xattn_video.pipelines.run_plan import RunPlan

# To estimate the waiting time: the speed of a CPU, and the number of calls of all parts.
_CPU_TFLOP_PER_SECOND = 0.1
_CALLS = 10
_PATIENCE_SECONDS = 120
_OPEN_MODEL = {
    "help": "Model whose attention is timed: demo, a hub ID, or a folder.",
    "default": None,
    "shown_default": "HunyuanVideo, from the hub; demo on a CPU",
}
_COLUMNS: dict[str, Callable[[dict[str, Any]], str | None]] = {
    "part": lambda row: "total" if row["name"] == "xattention" else row["name"],
    "by": lambda row: row["backend"],
    "density": lambda row: figure(row.get("density"), ".3f"),
    "ms": lambda row: f"{row['latency_ms']:.3g}",
    "TFLOP/s": lambda row: figure(row.get("tflops"), ".3g"),
}


@dataclass(frozen=True, slots=True)
class Timing:
    """What is timed, and how long."""

    density: float = knob(
        "Share of blocks to compute; in a real run it depends on the threshold.", 0.4
    )
    seconds: float = knob("Time limit for each row, in seconds.", 5.0)


@command
def bench(
    load: Annotated["LoadOptions", loading("model", "dtype", "device", **_OPEN_MODEL)],
    video: Annotated[VideoSettings, video_settings("height", "width", "num_frames")],
    sparse: Annotated[SparseSettings, sparse_subset("stride", "warmup_steps", "backend")],
    timing: Timing,
    errors: ErrorsToExitCodes,
    as_json: AsJson = False,
) -> None:
    """Time dense attention and XAttention on random tensors of a video's size."""
    from xattn_video.measure.attention_problems import AttentionProblem
    from xattn_video.measure.speedup import measure_speedup
    from xattn_video.measure.timing import Budget
    from xattn_video.pipelines.model_shape import read_model_shape
    from xattn_video.pipelines.run_plan import plan_run
    from xattn_video.pipelines.source import find_model

    counted = replace(sparse, threshold=None, density=timing.density)
    shape = read_model_shape(find_model(load.model))
    run_plan = plan_run(shape, video, sparse, load)
    tokens = run_plan.video_tokens + run_plan.text_tokens
    problem = AttentionProblem("bench", tokens, shape.heads, shape.head_dim)
    _warn_of_waiting(4e-12 * tokens**2 * shape.hidden, load.resolved_device.type)
    messages = progress_console()

    def show(row: dict[str, Any]) -> None:
        # Once something was measured, the arguments are known to be valid.
        errors.running = True
        messages.print(_progress(row), style="dim")

    found = measure_speedup(
        problem,
        load.resolved_device,
        load.resolved_dtype,
        counted,
        Budget(max_seconds=timing.seconds),
        show,
    )
    if as_json:
        typer.echo(json.dumps(_as_dict(found, run_plan), indent=2))
        return
    print_speedup(found, run_plan, output_console())


def _progress(row: dict[str, Any]) -> str:
    """One line of progress for a measured or failed row."""
    what = " ".join(str(row[key]) for key in ("name", "backend") if row.get(key)) or "inputs"
    return f"{what}: failed" if "failure" in row else f"{what}: {row['latency_ms']:.3g} ms"


def print_speedup(found: "Speedup", run_plan: "RunPlan", console: Console) -> None:
    """Print the rows and the resulting speed-ups; failures go to stderr."""
    tokens = run_plan.video_tokens + run_plan.text_tokens
    console.print(f"{tokens:,} tokens on {run_plan.device}, {run_plan.dtype}\n")
    table = Table.of(found.rows, _COLUMNS, num_left=2)
    console.print(table.terminal(console.width), crop=False)
    for row in found.failures:
        where = " ".join(str(row[key]) for key in ("name", "backend") if row.get(key))
        print_warning(f"{where or 'inputs'}: {' '.join(row['failure'].split())}")
    best = found.of_attention(found.best_dense)
    step = found.of_step(run_plan.attention_share)
    if best is None or step is None:
        return
    assert found.best_dense is not None
    run = _of_run(step, run_plan)
    lines = {
        "attention": f"{best:.2f}x as fast as {found.best_dense['backend']}, the best dense kernel"
        + _over_stock(found),
        "step": f"about {step:.2f}x: attention is {run_plan.attention_share:.0%} of a dense "
        "step's matrix products; norms and other operations reduce the gain",
        "video": f"about {run:.2f}x over {run_plan.steps} steps, "
        f"{run_plan.dense_steps} of them dense",
    }
    console.print()
    print_labelled(console, lines)
    if best < 1:
        print_warning(
            "Sparse attention is slower here than the best dense kernel. Use "
            "--dense, or a larger or longer video."
        )


def _over_stock(found: "Speedup") -> str:
    """The speed-up over the attention call of Diffusers' stock processor, as text."""
    stock = found.of_attention(found.stock)
    if stock is None:
        return ""
    return f"; {stock:.2f}x as fast as the stock processor's"


def _of_run(step: float, run_plan: "RunPlan") -> float:
    """The speed-up over all steps, including the dense steps."""
    return run_plan.steps / (run_plan.dense_steps + run_plan.sparse_steps / step)


def _as_dict(found: "Speedup", run_plan: "RunPlan") -> dict[str, Any]:
    step = found.of_step(run_plan.attention_share)
    return {
        **asdict(found),
        "attention_speedup": found.of_attention(found.best_dense),
        "attention_speedup_over_stock": found.of_attention(found.stock),
        "step_speedup": step,
        "video_speedup": None if step is None else _of_run(step, run_plan),
    }


def _warn_of_waiting(tflop: float, device: str) -> None:
    """Warn the user before a CPU works for minutes."""
    seconds = tflop * _CALLS / _CPU_TFLOP_PER_SECOND
    if device == "cpu" and seconds > _PATIENCE_SECONDS:
        print_warning(
            f"This takes about {seconds / 60:.0f} minutes on a CPU; a smaller --height, --width "
            "or --num-frames takes less."
        )
