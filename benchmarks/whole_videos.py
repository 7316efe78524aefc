"""Reports of `xattn-video generate` for whole videos at HunyuanVideo's size, and their tables."""

import itertools
import shlex
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.results_files import RESULTS, describe_video, read_reports
from xattn_video.pipelines.loading import LoadOptions
from xattn_video.pipelines.request import VideoSettings
from xattn_video.policy.presets import PRESETS
from xattn_video.policy.settings import SparseSettings
from xattn_video.reporting.machine import describe_versions
from xattn_video.reporting.tables import Table, figure

VIDEOS = RESULTS / "generate"
# The name of the folder that `benchmarks.random_pipeline` wrote, in any parent folder.
MODEL = "hunyuan-random"
_CONDITIONS = ("height", "width", "num_frames", "num_inference_steps", "true_cfg_scale")


@dataclass(frozen=True, slots=True)
class WholeVideo:
    """The report that `generate --report` wrote for one video."""

    stem: str
    content: dict[str, Any]

    @property
    def run(self) -> dict[str, Any]:
        """The only video of the command."""
        return self.content["runs"][0]

    @property
    def frames(self) -> str:
        return describe_video(self.run)

    @property
    def packages(self) -> str:
        """The package versions of the run."""
        return describe_versions(self.content["versions"])

    @property
    def gpus(self) -> int:
        """Number of GPUs that shared the video; 1 in older reports, which do not state it."""
        return self.content.get("ranks_per_video", 1)

    @property
    def other_seconds(self) -> float:
        """Seconds outside denoising: text encoding, decoding, moving weights."""
        run = self.run
        return run["seconds"] - run["dense_seconds"] - run["sparse_seconds"]

    @property
    def density(self) -> float | None:
        """The density of the sparse steps; None if there are none."""
        return self.run["report"]["density"]

    @property
    def conditions(self) -> tuple[Any, ...]:
        """What two videos to compare have in common: size, steps, guidance, GPU and offload."""
        of_run = (self.run[name] for name in _CONDITIONS)
        return (*of_run, self.content["device"], self.content["offload"])

    @property
    def preset(self) -> str | None:
        """The preset of its settings; None if there is none."""
        sparse = self.run["sparse"]
        names = (name for name, given in PRESETS.items() if given.items() <= sparse.items())
        return next(names, None)

    def count(self, *, sparse: bool) -> int:
        """The number of dense or of sparse steps."""
        return len(self._seconds(sparse))

    def step_seconds(self, *, sparse: bool) -> float | None:
        """Seconds of the fastest dense or sparse step; None for a single one, which compiled."""
        seconds = self._seconds(sparse)
        return min(seconds) if len(seconds) > 1 else None

    def _seconds(self, sparse: bool) -> list[float]:
        return [step["seconds"] for step in self.run["steps"] if step["sparse"] == sparse]

    @property
    def command(self) -> str:
        """The command, with only the options that differ from their defaults."""
        words = ["xattn-video"]
        if self.gpus > 1:
            words = ["torchrun", "--nproc-per-node", str(self.gpus), "-m", "xattn_video.cli"]
        words += ["generate", "--model", MODEL, "--prompt", self.run["prompt"]]
        if self.preset is None:
            words += ["--threshold", f"{self.run['sparse']['threshold']:g}"]
        else:
            words += ["--preset", self.preset]
        steps, warmup_steps = self.run["num_inference_steps"], self.run["sparse"]["warmup_steps"]
        offload = LoadOptions(device="cuda", device_elsewhere=True).resolved_offload
        for option, value, default in (
            ("--num-inference-steps", steps, VideoSettings().num_inference_steps),
            ("--warmup-steps", warmup_steps, SparseSettings().warmup_steps),
            ("--offload", self.content["offload"], offload),
        ):
            if value != default:
                words += [option, str(value)]
        return shlex.join([*words, "--report", f"{self.stem}.json"])


def read_whole_videos(folder: Path = VIDEOS) -> list[WholeVideo]:
    """The reports of videos of the model with random weights, the longest run first."""
    found = [WholeVideo(*report) for report in read_reports(folder, f"{MODEL}-*.json").items()]
    return sorted(found, key=lambda video: -video.run["seconds"])


def videos_table(videos: list[WholeVideo]) -> str:
    """The table of steps, seconds and memory of every video."""
    columns: dict[str, Callable[[WholeVideo], str]] = {
        "steps": lambda v: f"{v.count(sparse=False)} dense, {v.count(sparse=True)} sparse",
        "preset": lambda v: v.preset or "",
        "density": lambda v: figure(v.density, ".3f"),
        "backend": lambda v: ", ".join(v.run["report"]["backends"]),
        "offload": lambda v: v.content["offload"],
        "GPUs": lambda v: str(v.gpus),
        "s per dense step": lambda v: figure(v.step_seconds(sparse=False), ".1f"),
        "s per sparse step": lambda v: figure(v.step_seconds(sparse=True), ".1f"),
        "s for text and decoding": lambda v: f"{v.other_seconds:.0f}",
        "s in total": lambda v: f"{v.run['seconds']:.0f}",
        "peak GiB": lambda v: f"{v.run['peak_memory_gib']:.1f}",
    }
    return Table.of(videos, columns, num_left=len(columns)).markdown()


def readme_videos(videos: list[WholeVideo]) -> Iterator[tuple[str, ...]]:
    """Rows of sparse videos against the dense one of the same size, steps and offload."""
    for video, other in _pairs(videos):
        ours, theirs = video.run["seconds"], other.run["seconds"]
        steps = f"{video.count(sparse=True)} of {video.run['num_inference_steps']}"
        yield (
            f"a whole video, {video.frames}, {steps} steps sparse",
            video.content["device"],
            f"{video.density:.3f}",
            f"{theirs:.0f} s",
            f"{ours:.0f} s",
            f"{theirs / ours:.2f}x",
            "",
        )


def full_size_record(videos: list[WholeVideo]) -> dict[str, Any]:
    """The record of the fastest whole video, which ships with the package."""
    video, other = max(
        _pairs(videos), key=lambda pair: pair[1].run["seconds"] / pair[0].run["seconds"]
    )
    return {
        "video": f"HunyuanVideo, {video.frames}",
        "device": video.content["device"],
        "weights": "random",
        "steps": video.run["num_inference_steps"],
        "sparse_steps": video.count(sparse=True),
        "density": video.density,
        "dense_seconds": other.run["seconds"],
        "sparse_seconds": video.run["seconds"],
        "sources": [f"benchmarks/results/generate/{one.stem}.json" for one in (other, video)],
    }


def _pairs(videos: list[WholeVideo]) -> Iterator[tuple[WholeVideo, WholeVideo]]:
    """Pairs of a sparse video and its dense one."""
    for video, other in itertools.product(videos, videos):
        alike = (video.conditions, video.gpus) == (other.conditions, other.gpus)
        if alike and video.density is not None and other.density is None:
            yield video, other


def memory_by_offload(videos: list[WholeVideo]) -> str:
    """One sentence with the peak memory of every offload, without residuals."""
    peaks: dict[str, float] = {}
    for video in (video for video in videos if video.gpus == 1 and video.preset is None):
        offload, peak = video.content["offload"], video.run["peak_memory_gib"]
        peaks[offload] = max(peak, peaks.get(offload, 0.0))
    by_size = sorted(peaks.items(), key=lambda peak: -peak[1])
    listed = ", ".join(f"{gib:.1f} GiB with `--offload {name}`" for name, gib in by_size)
    return f"Peak GPU memory of these videos without a preset: {listed}."
