"""`xattn-video generate`: one video or many, with one load of the model."""

from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from xattn_video.cli.generate_job import GenerateJob, check_job, run_job
from xattn_video.cli.outputs import Prompts, PromptsFolder, choose_outputs
from xattn_video.options.command import command, knob
from xattn_video.options.groups import loading, sparse_settings, video_settings
from xattn_video.pipelines.request import GenerationRequest, VideoSettings
from xattn_video.pipelines.run_checks import refuse_ranks
from xattn_video.policy.settings import SparseSettings
from xattn_video.reporting.console import ErrorsToExitCodes

if TYPE_CHECKING:
    from xattn_video.pipelines.loading import LoadOptions


@dataclass(frozen=True, slots=True)
class GenerateDetails:
    """The remaining settings of a video."""

    negative_prompt: str | None = knob(
        "What the video must not show; needs --true-cfg-scale above 1.", panel="Video"
    )
    seed: int = knob("Seed of the initial noise, for every prompt.", 0, panel="Video")
    fps: int = knob("Frames per second of the file.", 24, panel="Video")
    force: bool = knob("Run even if the memory seems too small.", False, "--force", panel="Model")


@dataclass(frozen=True, slots=True)
class Files:
    """The files to write."""

    output: Path | None = knob(
        "Video file, .mp4 or .mkv (lossless); a folder with --prompts-file.",
        panel="Files",
        shown_default="named after the prompt; folder videos",
    )
    report: Path | None = knob("JSON file: settings, times and what ran.", panel="Files")
    plot: Path | None = knob(
        "PNG file: density by step and layer; a folder with --prompts-file.", panel="Files"
    )
    html: Path | None = knob(
        "HTML file: one page with the videos, density by step and layer, and what it cost.",
        panel="Files",
    )
    overwrite: bool = knob(
        "With --prompts-file: make every video anew, whatever is there.",
        False,
        "--overwrite",
        panel="Files",
    )


@command
def generate(
    prompts: Prompts,
    load: Annotated["LoadOptions", loading()],
    video: Annotated[VideoSettings, video_settings()],
    details: GenerateDetails,
    sparse: Annotated[SparseSettings | None, sparse_settings()],
    files: Files,
    errors: ErrorsToExitCodes,
) -> None:
    """Generate a video, or one for each line of a file; the same command resumes the latter."""
    from xattn_video.pipelines.memory import settle_offload

    refuse_ranks("xattn-video generate")
    load = settle_offload(load, video)
    requests = tuple(
        GenerationRequest(prompt, details.negative_prompt, details.seed, video, sparse)
        for prompt in prompts.read()
    )
    folder = None if prompts.prompts_file is None else PromptsFolder(files.output)
    with nullcontext() if folder is None else folder.lock():
        outputs = choose_outputs(requests, folder, files.output, files.report, files.plot)
        if files.html is not None:
            outputs = outputs.with_page(files.html)
        job = GenerateJob(
            load, requests, outputs, details.fps, errors.verbose, details.force, folder
        )
        check_job(job)
        if folder is not None:
            folder.adopt(job.settings(), files.overwrite)
        errors.running = True
        run_job(job)
