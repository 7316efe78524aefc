"""`xattn-video calibrate`: finds a density for every layer and head."""

import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from xattn_video.cli.outputs import Prompts
from xattn_video.cli.record import typed_command
from xattn_video.files import check_output_path
from xattn_video.options.command import AsJson, command, knob
from xattn_video.options.groups import calibrated_settings, loading, video_settings
from xattn_video.pipelines.request import GenerationRequest, VideoSettings, shorten_prompt
from xattn_video.pipelines.run_checks import check_runs
from xattn_video.pipelines.source import is_on_hub
from xattn_video.policy.settings import SparseSettings
from xattn_video.reporting.console import (
    output_console,
    print_labelled,
    print_warning,
    print_warnings,
    progress_console,
    quiet_libraries,
    written_name,
)
from xattn_video.reporting.endings import ErrorsToExitCodes
from xattn_video.reporting.progress import JobProgress, RunProgress
from xattn_video.reporting.tables import Table

if TYPE_CHECKING:
    from xattn_video.measure.calibration import Calibration
    from xattn_video.pipelines.loading import LoadOptions

# The error that calibrated densities remove at least, for them to be worth their file.
_LEAST_GAIN = 0.01


@dataclass(frozen=True, slots=True)
class CalibrateDetails:
    """The other settings of the videos, and the file to write."""

    output: Path = knob("JSON file for the densities, for --schedule.", ..., panel="Files")
    negative_prompt: str | None = knob(
        "What the videos must not show; needs --true-cfg-scale above 1.", panel="Video"
    )
    seed: int = knob("Seed of the initial noise, for every prompt.", 0, panel="Video")
    force: bool = knob("Run even if the memory seems too small.", False, "--force", panel="Model")


@command
def calibrate(
    prompts: Prompts,
    sparse: Annotated[SparseSettings, calibrated_settings()],
    load: Annotated["LoadOptions", loading()],
    video: Annotated[VideoSettings, video_settings()],
    details: CalibrateDetails,
    errors: ErrorsToExitCodes,
    as_json: AsJson = False,
) -> None:
    """Generate dense videos, and share the blocks out to the layers and heads that need them."""
    from xattn_video.pipelines.memory import settle_offload

    check_output_path(details.output, (".json",))
    requests = [
        GenerationRequest(prompt, details.negative_prompt, details.seed, video, sparse)
        for prompt in prompts.read()
    ]
    load = settle_offload(load, video)
    _check(load, requests, details.force)
    errors.running = True
    if not errors.verbose:
        quiet_libraries()
    found = _run(load, requests, sparse)
    replaced = details.output.exists()
    found.schedule.save(details.output)
    if as_json:
        about = {
            "command": typed_command(),
            "output": str(details.output),
            "replaced": replaced,
            "prompts": [request.prompt for request in requests],
            "sparse": sparse.to_dict(),
        }
        typer.echo(json.dumps(about | found.to_dict(), indent=2))
        return
    _print(found, written_name(details.output, replaced=replaced))


def _check(load: "LoadOptions", requests: Sequence[GenerationRequest], force: bool) -> None:
    """Check for everything that would fail, before the weights are loaded.

    Raises:
        ValueError: No step would be sparse, or as in `check_runs`.
        UnsupportedModelError, PipelineLoadError, BackendUnavailableError: As in `check_runs`.
    """
    from xattn_video.pipelines.model_shape import read_model_shape
    from xattn_video.pipelines.run_plan import planned_steps, why_all_dense
    from xattn_video.pipelines.source import find_model

    first, sparse = requests[0], requests[0].sparse
    assert sparse is not None
    # Calibration keeps residuals of few tokens, in host memory, so they need no check.
    unkept = replace(first, sparse=replace(sparse, refresh_every=None))
    warnings = check_runs(load, [unkept], force, [request.prompt for request in requests])
    shape = read_model_shape(find_model(load.model))
    video, device = first.video, load.resolved_device.type
    counts = planned_steps(shape, video, sparse, device)
    if counts.sparse <= counts.refreshes:
        assert unkept.sparse is not None
        tokens = math.prod(shape.grid(video.height, video.width, video.num_frames))
        unkept_counts = planned_steps(shape, video, unkept.sparse, device)
        raise ValueError(
            why_all_dense(sparse, unkept_counts, tokens, device)
            or "no step runs sparse between refreshes; run more steps."
        )
    print_warnings(warnings)


def _run(
    load: "LoadOptions", requests: Sequence[GenerationRequest], sparse: SparseSettings
) -> "Calibration":
    """Load the model, generate every prompt and find the densities."""
    from xattn_video.measure.calibration import calibrate as find_densities
    from xattn_video.pipelines.expected_work import ExpectedWork
    from xattn_video.pipelines.loading import load_pipeline
    from xattn_video.pipelines.prompt_length import cut_prompts

    with JobProgress(progress_console()).running() as shown:
        shown.load(load.model, downloads=is_on_hub(load.model))
        pipe = load_pipeline(load)
        pipe.set_progress_bar_config(disable=True)
        print_warnings(cut_prompts(pipe, requests))
        work = ExpectedWork.of(pipe)
        shown.left.decoding_steps = work.decoding_steps(requests[0].video)
        units = work.of_run(replace(requests[0], sparse=None))
        shown.expect([units] * len(requests))
        numbers = iter(range(1, len(requests) + 1))

        @contextmanager
        def progress(request: GenerationRequest) -> Iterator[RunProgress]:
            title = shorten_prompt(request.prompt, 50)
            with shown.run(f"{next(numbers)}/{len(requests)} {title}", units) as steps:
                yield steps

        return find_densities(pipe, requests, sparse, progress)


def _print(found: "Calibration", output: str) -> None:
    """Print the densities of each layer and the expected gain."""
    console = output_console()
    columns = {
        "layer": lambda layer: layer.layer,
        "least density": lambda layer: f"{layer.least:.3f}",
        "largest density": lambda layer: f"{layer.largest:.3f}",
    }
    console.print(Table.of(found.layers, columns).terminal(console.width), crop=False)
    # Without an error every block was kept.
    gain = 0.0
    if found.uniform_error:
        gain = max(gain, 1 - found.calibrated_error / found.uniform_error)
    lines = {
        "density": f"{found.density:.3f} of the blocks, uniform or by layer and head",
        "error": f"{found.uniform_error:.3g} uniform, {found.calibrated_error:.3g} calibrated "
        f"({gain:.0%} less): of attention outputs, squared, relative",
        "densities": f"{output}; for --schedule, with the same preset or other settings",
    }
    print_labelled(console, lines)
    if gain < _LEAST_GAIN:
        print_warning(
            "Other densities for some heads gain nothing here. Use videos of more blocks (larger, "
            "longer, or a smaller --block-size) or another --density."
        )
