"""Runs `xattn-video generate` after its arguments have been checked."""

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from rich.console import Console

from xattn_video.cli.outputs import Outputs, PromptsFolder, prompt_keys, reserved
from xattn_video.cli.record import generation_record, run_record, shaping_record, typed_command
from xattn_video.cli.summary import print_outlook, print_summary
from xattn_video.errors import FileNotWrittenError
from xattn_video.files import write_json, write_text
from xattn_video.pipelines.item_folder import Attempts
from xattn_video.pipelines.job_ranks import JobRanks
from xattn_video.pipelines.request import GenerationRequest, check_fps, shorten_prompt
from xattn_video.pipelines.run_checks import check_runs
from xattn_video.pipelines.source import DEMO, is_on_hub
from xattn_video.pipelines.work_split import WorkSplit
from xattn_video.policy.report import require_matplotlib
from xattn_video.reporting.console import (
    output_console,
    print_labelled,
    print_message,
    print_warnings,
    progress_console,
    quiet_libraries,
    written_name,
)
from xattn_video.reporting.endings import finishing_first
from xattn_video.reporting.progress import JobProgress

if TYPE_CHECKING:
    from diffusers import HunyuanVideoPipeline

    from xattn_video.pipelines.generation import GenerationResult
    from xattn_video.pipelines.loading import LoadOptions


@dataclass(frozen=True, slots=True)
class GenerateJob:
    """All videos of one command; they share everything but the prompt.

    Attributes:
        load, requests, outputs, fps: The model, the videos and their files.
        verbose: Whether libraries may print messages.
        force: Whether to run even if the memory seems too small.
        folder: Folder of the videos of a prompts file; None for a single video.
        ranks, split: The ranks of the job, and how they share the work.
    """

    load: "LoadOptions"
    requests: tuple[GenerationRequest, ...]
    outputs: Outputs
    fps: int
    verbose: bool
    force: bool = False
    folder: PromptsFolder | None = None
    ranks: JobRanks = field(default_factory=JobRanks)
    split: WorkSplit = field(default_factory=WorkSplit)

    def __post_init__(self) -> None:
        check_fps(self.fps)

    def settings(self) -> dict[str, Any]:
        """Everything that a prompt's video depends on."""
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
    """Check for what would fail or have no effect, before the weights are loaded.

    Raises:
        ValueError, UnsupportedModelError, PipelineLoadError: The model cannot be used.
        BackendUnavailableError: The backend cannot run the model's heads here.
        MissingPackageError: ffmpeg cannot write the videos, or matplotlib is missing for a plot.
    """
    from xattn_video.pipelines.video import check_encoders

    if job.requests[0].sparse is None and any(job.outputs.plots):
        raise ValueError("--plot shows the density of sparse steps, and --dense has none.")
    first = job.outputs.videos[0]
    if job.split.writes(job.ranks):
        suffixes = [video.suffix.lower() for video in job.outputs.videos]
        check_encoders(first.parent, suffixes, job.fps)
    if any(job.outputs.plots):
        require_matplotlib()
    # The requests share everything but the prompt.
    prompts = [request.prompt for request in job.requests]
    warnings = check_runs(job.load, job.requests[:1], job.force, prompts)
    warnings += _repeated(prompts)
    # Only one rank warns.
    if job.ranks.is_first:
        print_warnings(warnings)


def _repeated(prompts: Sequence[str]) -> list[str]:
    """A warning if a prompts file holds a prompt twice: all videos have the same seed."""
    repeated = len(prompts) - len(set(prompts))
    if not repeated:
        return []
    noun = "prompt repeats" if repeated == 1 else "prompts repeat"
    return [f"{repeated} {noun} an earlier one, and so will the video: all have the same seed."]


def claim_folder(job: GenerateJob, overwrite: bool) -> None:
    """Assign the folder of a prompts file to this job.

    Raises:
        ValueError: The folder belongs to a run with other settings.
    """
    if job.folder is not None:
        job.folder.claim(job.settings(), job.requests, job.outputs.videos, overwrite)


def run_job(job: GenerateJob) -> None:
    """Load the model, generate every missing video and write the files.

    Raises:
        KeyboardInterrupt: The run was interrupted; the text says how many videos are written.
        RuntimeError: Videos of a prompts file failed.
    """
    if not job.verbose:
        quiet_libraries()
    runs: dict[int, dict[str, Any]] = {}
    try:
        missing = job.ranks.share("missing prompts", lambda: _find_missing(job, runs))
        if missing:
            _generate_missing(job, missing, runs)
        if job.ranks.is_first:
            # Includes the videos that other ranks made.
            _write_page(job, runs | _finished(job))
            sparse = job.requests[0].sparse
            if missing and job.load.model == DEMO and sparse is not None:
                print_outlook(output_console(), sparse)
    except KeyboardInterrupt as interruption:
        # Includes the videos that other ranks made.
        written = runs | _finished(job)
        done = f"{len(written)} of {len(job.requests)} videos are written"
        raise type(interruption)(done) from None


def _find_missing(job: GenerateJob, runs: dict[int, dict[str, Any]]) -> list[int]:
    """The numbers of the prompts without a video; adds the records of the others to ``runs``."""
    for number, record in _finished(job).items():
        runs[number] = record
        plot = job.outputs.plots[number]
        lacks = (
            ""
            if plot is None or plot.exists()
            else f"; {plot} is missing: --overwrite generates the video again and draws it"
        )
        print_message(f"{job.outputs.videos[number]} exists already{lacks}")
    print_labelled(output_console(), _write_report(job, runs))
    return [number for number in range(len(job.requests)) if number not in runs]


def _finished(job: GenerateJob) -> dict[int, dict[str, Any]]:
    """The records of the finished videos, by the number of the prompt."""
    if job.folder is None:
        return {}
    found = {}
    for number, key in enumerate(prompt_keys(job.requests)):
        record = job.folder.record(key)
        if record is not None:
            # The folder may have been moved since.
            found[number] = record["run"] | {"file": str(job.outputs.videos[number])}
    return found


def _generate_missing(
    job: GenerateJob, missing: list[int], runs: dict[int, dict[str, Any]]
) -> None:
    """Generate the missing videos, and add the record of each to ``runs`` once it is written."""
    with _display(job).running() as shown:
        pipe = _load(job, missing, shown)
        if job.folder is None:
            _generate_one(job, pipe, 0, runs, shown)
            return
        keys = [prompt_keys(job.requests)[number] for number in missing]
        if job.ranks.is_first:
            job.folder.forget_failures(keys)
        job.ranks.meet()
        if job.split.ranks_per_video > 1:
            for number in missing:
                # A failure on one rank leaves the others waiting, so it ends the run.
                _generate_one(job, pipe, number, runs, shown)
            return
        attempts = Attempts(job.folder, print_message)
        share = _share_of(job, missing)
        for made, number in enumerate(job.ranks.deal(missing)):
            if made >= share:
                # Other ranks are slower, so this rank makes more than its share.
                _expect(job, pipe, 1, shown)
            with attempts.item(prompt_keys(job.requests)[number], job.outputs.videos[number].name):
                _generate_one(job, pipe, number, runs, shown)
    _conclude(job, attempts, keys)


def _display(job: GenerateJob) -> JobProgress:
    """The display of the first rank's work; other ranks have none, as displays would mix."""
    return JobProgress(progress_console() if job.ranks.is_first else Console(quiet=True))


def _load(job: GenerateJob, missing: list[int], shown: JobProgress) -> "HunyuanVideoPipeline":
    """Load the model, let the ranks share it, and announce the work."""
    from xattn_video.pipelines.loading import load_pipeline
    from xattn_video.pipelines.prompt_length import cut_prompts

    if not job.ranks.is_first:
        print_message(f"loading {job.load.model}")
    shown.load(job.load.model, downloads=is_on_hub(job.load.model))
    if job.split.ranks_per_video > 1:
        job.ranks.connect(job.load.resolved_device)
    pipe = load_pipeline(job.load)
    pipe.set_progress_bar_config(disable=True)
    job.split.share(pipe)
    if job.ranks.is_first:
        print_warnings(cut_prompts(pipe, [job.requests[number] for number in missing]))
    _expect(job, pipe, _share_of(job, missing), shown)
    return pipe


def _share_of(job: GenerateJob, missing: list[int]) -> int:
    """Number of videos that this rank makes or helps to make if all ranks are equally fast."""
    return math.ceil(len(missing) / job.ranks.count) if job.split.by_prompt else len(missing)


def _conclude(job: GenerateJob, attempts: Attempts, keys: list[str]) -> None:
    """Wait for the other ranks, and raise RuntimeError if videos failed on any of them."""
    assert job.folder is not None
    job.ranks.meet()
    if job.ranks.is_first and not job.ranks.is_alone:
        attempts.failed = sum(job.folder.failure(key) is not None for key in keys)
    if job.ranks.is_first:
        print_labelled(output_console(), _write_report(job, _finished(job)))
        attempts.conclude(len(keys))


def _expect(
    job: GenerateJob, pipe: "HunyuanVideoPipeline", videos: int, shown: JobProgress
) -> None:
    """Announce the work of some videos to the display."""
    from xattn_video.pipelines.expected_work import ExpectedWork

    work, first = ExpectedWork.of(pipe), job.requests[0]
    if shown.left.decoding_steps is None:
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

    request, ranks = job.requests[number], job.ranks
    title = shorten_prompt(request.prompt, 50)
    if len(job.requests) > 1:
        title = f"{number + 1}/{len(job.requests)} {title}"
    if not ranks.is_first:
        print_message(title)
    is_shared = job.split.ranks_per_video > 1
    units = ExpectedWork.of(pipe).of_run(request) | {"writing": 1}
    with (
        ranks.computing(pipe) if is_shared else nullcontext(),
        shown.run(title, units) as progress,
    ):
        result = generate(pipe, request, progress)
    if not job.split.writes(ranks):
        return
    # A launcher ends all ranks when one has ended; writing is finished first.
    with nullcontext() if ranks.is_alone else finishing_first():
        _write_one(job, number, result, runs, shown)


def _write_one(
    job: GenerateJob,
    number: int,
    result: "GenerationResult",
    runs: dict[int, dict[str, Any]],
    shown: JobProgress,
) -> None:
    """Write the files of a video and print its summary."""
    from xattn_video.pipelines.video import write_video_or_keep_frames

    request, plot = job.requests[number], job.outputs.plots[number]
    video = job.outputs.videos[number]
    replaced = video.exists() and not job.outputs.is_default
    with reserved(video) if job.outputs.is_default else nullcontext(video) as video:
        write_video_or_keep_frames(video, result.frames, job.fps)
    runs[number] = generation_record(request, result, video)
    if job.folder is not None:
        job.folder.add(prompt_keys(job.requests)[number], [video], {"run": runs[number]})
    files = {"video": written_name(video, replaced=replaced)}
    failed = []
    try:
        if plot is not None and result.report is not None:
            result.report.plot(plot)
            files["plot"] = job.outputs.name_of(plot)
    except FileNotWrittenError as error:
        failed.append(error)
    try:
        if not job.split.by_prompt:
            files |= _write_report(job, runs)
    except FileNotWrittenError as error:
        failed.append(error)
    with shown.paused():
        print_summary(output_console(), request, result, files, job.load)
    if failed and job.folder is None:
        raise failed[0]
    # The video is finished, and the report is written again at the end.
    print_warnings(map(str, failed))


def _write_page(job: GenerateJob, runs: dict[int, dict[str, Any]]) -> None:
    """Write a web page of all finished videos."""
    from xattn_video.measure.generation_web import generation_web_page

    if job.outputs.html is not None and runs:
        page = generation_web_page(_record(job, runs), typed_command())
        write_text(job.outputs.html, page.html())
        print_labelled(output_console(), {"page": job.outputs.name_of(job.outputs.html)})


def _write_report(job: GenerateJob, runs: dict[int, dict[str, Any]]) -> dict[str, str]:
    """Write the report, and return its line for the summary; none without a report.

    Called after every video, so that an interrupted run leaves a report.
    """
    if job.outputs.report is None or not runs:
        return {}
    ranks = {"ranks": job.ranks.count, "ranks_per_video": job.split.ranks_per_video}
    write_json(job.outputs.report, _record(job, runs) | ranks)
    return {"report": job.outputs.name_of(job.outputs.report)}


def _record(job: GenerateJob, runs: dict[int, dict[str, Any]]) -> dict[str, Any]:
    """The content of the report: what all videos share, then each video."""
    return {
        **run_record(job.load, job.fps),
        "runs": [runs[number] for number in sorted(runs)],
    }
