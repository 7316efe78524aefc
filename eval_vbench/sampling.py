"""Generates the part of a run that belongs to a rank; every video once, even after a kill."""

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from eval_vbench.launch import Share
from eval_vbench.prompts import VideoItem
from eval_vbench.run_folder import RunFolder
from xattn_video.measure.clips import Clip
from xattn_video.measure.comparison import judge_demo_clip
from xattn_video.pipelines.generation import GenerationResult, StepRecord, generate
from xattn_video.pipelines.item_folder import Attempts
from xattn_video.pipelines.job_ranks import JobRanks
from xattn_video.pipelines.request import GenerationRequest, VideoSettings
from xattn_video.pipelines.video import write_video
from xattn_video.policy.settings import SparseSettings
from xattn_video.reporting.machine import machine_record

if TYPE_CHECKING:
    from diffusers import HunyuanVideoPipeline

_POLL_SECONDS = 0.5


@dataclass(frozen=True, slots=True)
class Sampling:
    """What all videos of a run share.

    Attributes:
        run: The folder of the run.
        share: The part of the videos that this process generates.
        video: Size and sampling.
        sparse: None for dense attention.
        fps: Frames per second of the files.
        lossless: Whether a lossless copy is kept.
        say: Prints a line of progress.
        progress: Opens a display for the steps of a video: its title, the pipeline, the item.
        team: The ranks that share each video.
    """

    run: RunFolder
    share: Share
    video: VideoSettings
    sparse: SparseSettings | None
    fps: int
    lossless: bool
    say: Callable[[str], None]
    progress: Callable[
        [str, "HunyuanVideoPipeline", VideoItem],
        AbstractContextManager[Callable[[StepRecord], None]],
    ]
    team: JobRanks

    def missing(self, items: Sequence[VideoItem]) -> list[VideoItem]:
        """Those of this process's items that are not done."""
        return [item for item in self.share.of(items) if self.run.record(item.key) is None]

    def sample(self, pipe: "HunyuanVideoPipeline", items: Sequence[VideoItem]) -> Attempts:
        """Generate what is missing and return how that went; what failed is noted.

        Raises:
            RunStoppedError: The disk is full, or one video after the other fails.
        """
        begun, attempts = time.perf_counter(), Attempts(self.run, self.say)
        for number, item in enumerate(items):
            title = f"{number + 1}/{len(items)} {item.file_name}"
            # What fails on one rank leaves its team waiting: that ends the job.
            alone = self.team.team_size == 1
            attempt = attempts.item(item.key, item.file_name) if alone else nullcontext()
            with attempt, self.progress(title, pipe, item) as on_step:
                self._sample_one(pipe, item, on_step)
            mean = (time.perf_counter() - begun) / (number + 1)
            left = len(items) - number - 1
            self.say(
                f"{number + 1}/{len(items)} videos, {mean:.1f} s each, "
                f"{format_seconds(mean * left)} left"
            )
        return attempts

    def _sample_one(
        self,
        pipe: "HunyuanVideoPipeline",
        item: VideoItem,
        on_step: Callable[[StepRecord], None],
    ) -> None:
        request = GenerationRequest(
            item.prompt.text, seed=item.seed, video=self.video, sparse=self.sparse
        )
        with self.team.computing(pipe) if self.team.team_size > 1 else nullcontext():
            result = generate(pipe, request, on_step)
        if not self.team.is_first_of_team:
            return
        places = [self.run.video(item)]
        if self.lossless:
            places.append(self.run.lossless_video(item))
        files = {
            self.run.unfinished(self.share.rank, f"{item.key}{place.suffix}"): place
            for place in places
        }
        for file in files:
            write_video(file, result.frames, self.fps)
        self.run.add_video(item, files, _record(pipe, item, request, result, self.fps))


def settled(run: RunFolder, items: Sequence[VideoItem]) -> bool:
    """Whether every video is done or has failed."""
    return all(
        run.record(item.key) is not None or run.failure(item.key) is not None for item in items
    )


def wait_for_others(run: RunFolder, items: Sequence[VideoItem]) -> None:
    """Wait until all ranks are done.

    A launcher ends every rank as soon as one returns an error, so a rank with failed videos waits
    for the others before it reports them.
    """
    while not settled(run, items):
        time.sleep(_POLL_SECONDS)


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
