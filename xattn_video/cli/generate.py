"""`xattn-video generate`: one video or many, with one load of the model."""

from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from xattn_video.cli.generate_job import GenerateJob, check_job, claim_folder, run_job
from xattn_video.cli.outputs import Prompts, PromptsFolder, choose_outputs
from xattn_video.options.command import command, knob
from xattn_video.options.groups import loading, sparse_settings, video_settings
from xattn_video.pipelines.job_ranks import JobRanks, speak
from xattn_video.pipelines.request import GenerationRequest, VideoSettings
from xattn_video.pipelines.work_split import check_parallel, choose_split
from xattn_video.policy.settings import SparseSettings
from xattn_video.reporting.endings import ErrorsToExitCodes

if TYPE_CHECKING:
    from xattn_video.pipelines.loading import LoadOptions


@dataclass(frozen=True, slots=True)
class GenerateDetails:
    """The other settings of a video."""

    negative_prompt: str | None = knob(
        "What the video must not show; needs --true-cfg-scale above 1.", panel="Video"
    )
    seed: int = knob("Seed of the initial noise, for every prompt.", 0, panel="Video")
    fps: int = knob("Frames per second of the file.", 24, panel="Video")
    parallel: str = knob(
        "How the ranks started by torchrun divide the work: ulysses (tokens of each video), cfg "
        "(the two passes of true guidance), prompts (the prompts of a file) or auto.",
        "auto",
        panel="Model",
    )
    force: bool = knob("Run even if the memory seems too small.", False, "--force", panel="Model")


@dataclass(frozen=True, slots=True)
class Files:
    """The files to write."""

    output: Path | None = knob(
        "Video file, .mp4 or .mkv (lossless); a folder with --prompts-file.",
        panel="Files",
        shown_default="named after the prompt; folder videos",
    )
    report: Path | None = knob(
        "JSON file for the settings, the times and the attention report.", panel="Files"
    )
    plot: Path | None = knob(
        "PNG file for density by step and layer; a folder with --prompts-file.", panel="Files"
    )
    html: Path | None = knob(
        "HTML file for one page with the videos, their density, time and memory.",
        panel="Files",
    )
    overwrite: bool = knob(
        "With --prompts-file: generate the videos again and replace them; others stay.",
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
    ranks: JobRanks,
) -> None:
    """Generate a video, or one for each line of a prompts file, which a second run resumes."""
    from xattn_video.pipelines.memory import settle_offload

    with ranks.first_ahead():
        check_parallel(details.parallel, ranks.count)
        load = ranks.place(load)
        requests = tuple(
            GenerationRequest(prompt, details.negative_prompt, details.seed, video, sparse)
            for prompt in prompts.read()
        )
    ranks.agree("prompts", {"prompts": [request.prompt for request in requests]})
    paths = (files.output, files.report, files.plot, files.html)
    with ranks.first_ahead():
        num_prompts = None if prompts.prompts_file is None else len(requests)
        split = choose_split(details.parallel, ranks.count, load.model, video, num_prompts)
        load = settle_offload(replace(load, num_gpus=split.ranks_per_pass), video)
        if split.by_prompt:
            speak()
        folder = None if prompts.prompts_file is None else PromptsFolder(files.output)
        job = GenerateJob(
            load,
            requests,
            choose_outputs(requests, folder, *paths),
            details.fps,
            errors.verbose,
            details.force,
            folder,
            ranks,
            split,
        )
        check_job(job)
    # What one rank refuses must leave nothing of the others.
    ranks.meet()
    with folder.lock() if folder is not None and ranks.is_first else nullcontext():
        with ranks.first_ahead():
            if folder is not None:
                # Another run may have written there before the lock.
                job = replace(job, outputs=choose_outputs(requests, folder, *paths))
            if ranks.is_first:
                claim_folder(job, files.overwrite)
        errors.running = True
        run_job(job)
