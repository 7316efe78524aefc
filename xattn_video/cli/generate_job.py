"""Runs `xattn-video generate` after its arguments have been checked."""

from dataclasses import dataclass
from textwrap import shorten
from typing import TYPE_CHECKING, Any

from xattn_video.cli.outputs import Outputs
from xattn_video.cli.record import generation_record, job_record
from xattn_video.cli.summary import print_summary
from xattn_video.files import write_json
from xattn_video.pipelines.request import GenerationRequest, check_fps
from xattn_video.pipelines.run_checks import check_runs, unknown_words
from xattn_video.pipelines.source import DEMO
from xattn_video.policy.report import require_matplotlib
from xattn_video.reporting.console import (
    message_console,
    output_console,
    print_warnings,
    quiet_libraries,
)
from xattn_video.reporting.progress import GenerationProgress

if TYPE_CHECKING:
    from xattn_video.pipelines.loading import LoadOptions


@dataclass(frozen=True, slots=True)
class GenerateJob:
    """All videos of one command; they share everything but the prompt."""

    load: "LoadOptions"
    requests: tuple[GenerationRequest, ...]
    outputs: Outputs
    fps: int
    verbose: bool
    force: bool = False

    def __post_init__(self) -> None:
        check_fps(self.fps)


def check_job(job: GenerateJob) -> None:
    """Check, before the weights are loaded, what would fail or have no effect.

    Raises:
        ValueError, UnsupportedModelError, PipelineLoadError: The model cannot be used.
        BackendUnavailableError: The backend cannot run the model's heads here.
        MissingPackageError: ffmpeg cannot write the videos, or matplotlib is missing for a plot.
    """
    from xattn_video.pipelines.video import check_encoders

    if job.requests[0].sparse is None and any(job.outputs.plots):
        raise ValueError("--plot shows the density of sparse steps; --dense has none.")
    first = job.outputs.videos[0]
    check_encoders(first.parent, [video.suffix.lower() for video in job.outputs.videos], job.fps)
    if any(job.outputs.plots):
        require_matplotlib()
    # The requests share everything but the prompt.
    warnings = check_runs(job.load, job.requests[:1], job.force)
    if job.load.model == DEMO:
        warnings += unknown_words([request.prompt for request in job.requests])
    print_warnings(warnings)


def run_job(job: GenerateJob) -> None:
    """Load the model, generate every video and write the files.

    Raises:
        KeyboardInterrupt: With the number of videos that are written.
    """
    if not job.verbose:
        quiet_libraries()
    runs: list[dict[str, Any]] = []
    try:
        _generate_all(job, runs)
    except KeyboardInterrupt as interruption:
        done = f"{len(runs)} of {len(job.requests)} videos are written"
        raise type(interruption)(done) from None


def _generate_all(job: GenerateJob, runs: list[dict[str, Any]]) -> None:
    """Append the record of every video to ``runs`` once it is written."""
    from xattn_video.pipelines.generation import generate
    from xattn_video.pipelines.loading import load_pipeline
    from xattn_video.pipelines.prompt_length import cut_prompts
    from xattn_video.pipelines.video import write_video_or_keep_frames

    messages = message_console()
    # A plain line: a spinner would hide the bars of a download.
    messages.print(f"loading {job.load.model}", soft_wrap=True)
    pipe = load_pipeline(job.load)
    pipe.set_progress_bar_config(disable=True)
    print_warnings(cut_prompts(pipe, job.requests))
    for number, request in enumerate(job.requests):
        video, plot = job.outputs.videos[number], job.outputs.plots[number]
        title = shorten(request.prompt, 50, placeholder="...")
        if len(job.requests) > 1:
            title = f"{number + 1}/{len(job.requests)} {title}"
        with GenerationProgress(messages, title, request.video.num_inference_steps) as progress:
            result = generate(pipe, request, progress)
        replaced = video.exists()
        write_video_or_keep_frames(video, result.frames, job.fps)
        runs.append(generation_record(request, result, video))
        if plot is not None and result.report is not None:
            result.report.plot(plot)
        if job.outputs.report is not None:
            # Rewritten after every video, so that a run cut short leaves what it did.
            write_json(job.outputs.report, job_record(job.load, job.fps, runs))
        files = {"video": f"{video} (replaced)" if replaced else str(video)}
        files |= {"plot": str(plot)} if plot is not None else {}
        files |= {"report": str(job.outputs.report)} if job.outputs.report is not None else {}
        print_summary(output_console(), request, result, files)
