"""Runs `xattn-video generate` after its arguments have been checked."""

from dataclasses import asdict, dataclass
from textwrap import shorten
from typing import TYPE_CHECKING, Any

from xattn_video.cli.outputs import Outputs, PromptsFolder, prompt_keys
from xattn_video.cli.record import generation_record, job_record, shaping_record
from xattn_video.cli.summary import print_summary
from xattn_video.files import write_json
from xattn_video.pipelines.item_folder import Attempts
from xattn_video.pipelines.request import GenerationRequest, check_fps
from xattn_video.pipelines.run_checks import check_runs, unknown_words
from xattn_video.pipelines.source import DEMO, is_on_hub
from xattn_video.policy.report import require_matplotlib
from xattn_video.reporting.console import (
    output_console,
    print_message,
    print_warnings,
    progress_console,
    quiet_libraries,
)
from xattn_video.reporting.progress import JobProgress

if TYPE_CHECKING:
    from diffusers import HunyuanVideoPipeline

    from xattn_video.pipelines.loading import LoadOptions


@dataclass(frozen=True, slots=True)
class GenerateJob:
    """All videos of one command; they share everything but the prompt.

    Attributes:
        load, requests, outputs, fps: What is made.
        verbose: Whether the libraries may speak.
        force: Whether to run what seems not to fit in memory.
        folder: Of the videos of a prompts file; None for a video by itself.
    """

    load: "LoadOptions"
    requests: tuple[GenerationRequest, ...]
    outputs: Outputs
    fps: int
    verbose: bool
    force: bool = False
    folder: PromptsFolder | None = None

    def __post_init__(self) -> None:
        check_fps(self.fps)

    def settings(self) -> dict[str, Any]:
        """All that a prompt's video depends on."""
        first = self.requests[0]
        return {
            **shaping_record(self.load, self.fps),
            "negative_prompt": first.negative_prompt,
            "seed": first.seed,
            "video": asdict(first.video),
            "sparse": None if first.sparse is None else first.sparse.to_dict(),
            "suffix": self.outputs.videos[0].suffix,
        }


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
    """Load the model, generate every video that is not there and write the files.

    Raises:
        KeyboardInterrupt: With the number of videos that are written.
        RuntimeError: Videos of a prompts file failed.
    """
    if not job.verbose:
        quiet_libraries()
    runs = _finished(job)
    try:
        _generate_missing(job, runs)
    except KeyboardInterrupt as interruption:
        done = f"{len(runs)} of {len(job.requests)} videos are written"
        raise type(interruption)(done) from None


def _finished(job: GenerateJob) -> dict[int, dict[str, Any]]:
    """The records of the videos that earlier runs made, by the number of the prompt."""
    found: dict[int, dict[str, Any]] = {}
    if job.folder is None:
        return found
    job.folder.keep_names(job.requests, job.outputs.videos)
    for number, key in enumerate(prompt_keys(job.requests)):
        record = job.folder.record(key)
        if record is not None:
            found[number] = record["run"]
            plot = job.outputs.plots[number]
            lacks = "" if plot is None or plot.exists() else f"; no {plot}: --overwrite makes it"
            print_message(f"{job.outputs.videos[number]} is there{lacks}")
    return found


def _generate_missing(job: GenerateJob, runs: dict[int, dict[str, Any]]) -> None:
    """Add the record of every video to ``runs`` once it is written."""
    from xattn_video.pipelines.loading import load_pipeline
    from xattn_video.pipelines.prompt_length import cut_prompts

    missing = [number for number in range(len(job.requests)) if number not in runs]
    keys, folder = prompt_keys(job.requests), job.folder
    _write_report(job, runs)
    if not missing:
        return
    with JobProgress(progress_console()).running() as shown:
        shown.load(job.load.model, downloads=is_on_hub(job.load.model))
        pipe = load_pipeline(job.load)
        pipe.set_progress_bar_config(disable=True)
        print_warnings(cut_prompts(pipe, [job.requests[number] for number in missing]))
        _expect(job, pipe, len(missing), shown)
        if folder is None:
            _generate_one(job, pipe, 0, runs, shown)
            return
        folder.forget_failures(keys[number] for number in missing)
        attempts = Attempts(folder, print_message)
        for number in missing:
            video = job.outputs.videos[number]
            with attempts.item(keys[number], video.name):
                _generate_one(job, pipe, number, runs, shown)
                folder.add(keys[number], [video], {"run": runs[number]})
    attempts.conclude(len(missing))


def _expect(
    job: GenerateJob, pipe: "HunyuanVideoPipeline", videos: int, shown: JobProgress
) -> None:
    """Tell the display what is to come."""
    from xattn_video.pipelines.expected_work import ExpectedWork

    work, first = ExpectedWork.of(pipe), job.requests[0]
    shown.left.decoding_steps = work.decoding_steps(first.video)
    shown.expect([work.of_run(first) | {"writing": 1}] * videos)


def _generate_one(
    job: GenerateJob,
    pipe: "HunyuanVideoPipeline",
    number: int,
    runs: dict[int, dict[str, Any]],
    shown: JobProgress,
) -> None:
    from xattn_video.pipelines.expected_work import ExpectedWork
    from xattn_video.pipelines.generation import generate
    from xattn_video.pipelines.video import write_video_or_keep_frames

    request, video, plot = (
        job.requests[number],
        job.outputs.videos[number],
        job.outputs.plots[number],
    )
    title = shorten(request.prompt, 50, placeholder="...")
    if len(job.requests) > 1:
        title = f"{number + 1}/{len(job.requests)} {title}"
    units = ExpectedWork.of(pipe).of_run(request) | {"writing": 1}
    with shown.run(title, units) as progress:
        result = generate(pipe, request, progress)
    replaced = video.exists()
    write_video_or_keep_frames(video, result.frames, job.fps)
    runs[number] = generation_record(request, result, video)
    if plot is not None and result.report is not None:
        result.report.plot(plot)
    _write_report(job, runs)
    files = {"video": f"{video} (replaced)" if replaced else str(video)}
    files |= {"plot": str(plot)} if plot is not None else {}
    files |= {"report": str(job.outputs.report)} if job.outputs.report is not None else {}
    with shown.paused():
        print_summary(output_console(), request, result, files)


def _write_report(job: GenerateJob, runs: dict[int, dict[str, Any]]) -> None:
    """Rewritten after every video, so that a run cut short leaves what it did."""
    if job.outputs.report is not None and runs:
        ordered = [runs[number] for number in sorted(runs)]
        write_json(job.outputs.report, job_record(job.load, job.fps, ordered))
