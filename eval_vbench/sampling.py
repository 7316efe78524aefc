"""Generates a rank's part of a run; every video is made once, even after a killed run."""

import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from eval_vbench.prompts import VideoItem
from xattn_video.measure.clips import Clip
from xattn_video.measure.comparison import judge_demo_clip
from xattn_video.pipelines.expected_work import ExpectedWork
from xattn_video.pipelines.generation import GenerationResult, StepRecord, generate
from xattn_video.pipelines.item_folder import Attempts
from xattn_video.pipelines.request import GenerationRequest
from xattn_video.pipelines.video import write_video
from xattn_video.reporting.console import print_message
from xattn_video.reporting.machine import machine_record
from xattn_video.reporting.progress import JobProgress

if TYPE_CHECKING:
    from diffusers import HunyuanVideoPipeline

    from eval_vbench.sampling_job import SamplingJob


def sample(
    job: "SamplingJob",
    pipe: "HunyuanVideoPipeline",
    items: Sequence[VideoItem],
    attempts: Attempts,
    shown: JobProgress,
) -> None:
    """Generate the missing videos; failures are recorded.

    Args:
        job: The rank's part of a run.
        pipe: The loaded pipeline.
        items: The missing videos.
        attempts: The attempts to generate them.
        shown: The display of the steps.

    Raises:
        RunStoppedError: The disk is full, or several videos failed in a row.
    """
    begun, work = time.perf_counter(), ExpectedWork.of(pipe)
    for number, item in enumerate(items):
        title = f"{number + 1}/{len(items)} {item.file_name}"
        # In a team, a failure on one rank leaves the others waiting, so it ends the job.
        alone = job.team.team_size == 1
        attempt = attempts.item(item.key, item.file_name) if alone else nullcontext()
        # Writing a video counts as part of its decoding.
        with attempt, shown.run(title, work.of_run(job.request(item))) as on_step:
            _sample_one(job, pipe, item, on_step)
        mean = (time.perf_counter() - begun) / (number + 1)
        left = len(items) - number - 1
        print_message(
            f"{number + 1}/{len(items)} videos, {mean:.1f} s each, "
            f"{format_seconds(mean * left)} left"
        )


def _sample_one(
    job: "SamplingJob",
    pipe: "HunyuanVideoPipeline",
    item: VideoItem,
    on_step: Callable[[StepRecord], None],
) -> None:
    request, run = job.request(item), job.run
    with job.team.computing(pipe) if job.team.team_size > 1 else nullcontext():
        result = generate(pipe, request, on_step)
    if not job.writes:
        return
    places = [run.video(item)]
    if job.asked.lossless:
        places.append(run.lossless_video(item))
    files = {
        run.unfinished(job.share.rank, f"{item.key}{place.suffix}"): place for place in places
    }
    for file in files:
        write_video(file, result.frames, job.asked.fps)
    run.add_video(item, files, _record(pipe, item, request, result, job.asked.fps))


def format_seconds(seconds: float) -> str:
    """Format seconds, such as "3 h 05 min" or "12 s"."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def _record(
    pipe: "HunyuanVideoPipeline",
    item: VideoItem,
    request: GenerationRequest,
    result: GenerationResult,
    fps: int,
) -> dict[str, Any]:
    """The record of one video for the report."""
    return {
        "text": request.prompt,
        "prompt_tokens": [asdict(count) for count in result.prompt_tokens],
        "shape": list(result.frames.shape),
        "seconds": result.seconds,
        "seconds_per_dense_step": result.seconds_per_dense_step,
        "seconds_per_sparse_step": result.seconds_per_sparse_step,
        "peak_memory_gib": result.peak_memory_gib,
        "density": None if result.report is None else result.report.density,
        "backends": [] if result.report is None else list(result.report.backends),
        "checks": judge_demo_clip(item.prompt.name, Clip(result.frames, fps)),
        "flow_shift": pipe.scheduler.config.get("shift"),
        **machine_record(pipe._execution_device),
    }
