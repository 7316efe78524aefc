"""Reports of whole videos by `xattn-video generate` at HunyuanVideo's size, and their tables."""

import json
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.results_files import RESULTS, describe_video
from xattn_video.pipelines.loading import LoadOptions
from xattn_video.pipelines.request import VideoSettings
from xattn_video.policy.settings import SparseSettings

VIDEOS = RESULTS / "generate"
# The folder that `benchmarks.random_pipeline` wrote, wherever it was.
MODEL = "hunyuan-random"

PAGE_HEADINGS = [
    "steps",
    "density",
    "by",
    "offload",
    "s a dense step",
    "s a sparse step",
    "s for text and decoding",
    "s in all",
    "peak GiB",
]
README_HEADINGS = ["on", "video", "sparse steps", "density", "dense", "sparse", "faster"]


@dataclass(frozen=True, slots=True)
class WholeVideo:
    """What `--report` kept of one video."""

    stem: str
    content: dict[str, Any]

    @property
    def run(self) -> dict[str, Any]:
        """The one video of the command."""
        return self.content["runs"][0]

    @property
    def device(self) -> str:
        return self.content["device"]

    @property
    def frames(self) -> str:
        return describe_video(self.run)

    @property
    def offload(self) -> str:
        return self.content["offload"]

    @property
    def seconds(self) -> float:
        return self.run["seconds"]

    @property
    def other_seconds(self) -> float:
        """Text, decoding, and moving weights between denoising and these."""
        return self.seconds - self.run["dense_seconds"] - self.run["sparse_seconds"]

    @property
    def density(self) -> float | None:
        """Of the sparse steps; None where there are none."""
        return self.run["report"]["density"]

    @property
    def peak_memory_gib(self) -> float:
        return self.run["peak_memory_gib"]

    def count(self, *, sparse: bool) -> int:
        """How many steps of a kind there were."""
        return len(self._seconds(sparse))

    def step_seconds(self, *, sparse: bool) -> float | None:
        """The fastest step of a kind; None of a single one, in which kernels were compiled."""
        seconds = self._seconds(sparse)
        return min(seconds) if len(seconds) > 1 else None

    def _seconds(self, sparse: bool) -> list[float]:
        return [step["seconds"] for step in self.run["steps"] if step["sparse"] == sparse]

    @property
    def command(self) -> str:
        """The command with the options that were not left at their defaults."""
        words = ["xattn-video", "generate", "--model", MODEL, "--prompt", self.run["prompt"]]
        words += ["--threshold", f"{self.run['sparse']['threshold']:g}"]
        steps, warmup_steps = self.run["num_inference_steps"], self.run["sparse"]["warmup_steps"]
        offload = LoadOptions(device="cuda", device_elsewhere=True).resolved_offload
        for option, value, default in (
            ("--num-inference-steps", steps, VideoSettings().num_inference_steps),
            ("--warmup-steps", warmup_steps, SparseSettings().warmup_steps),
            ("--offload", self.offload, offload),
        ):
            if value != default:
                words += [option, str(value)]
        return shlex.join([*words, "--report", f"{self.stem}.json"])


def read_whole_videos(folder: Path = VIDEOS) -> list[WholeVideo]:
    """The reports of videos of the model with random weights, the longest run first."""
    found = [
        WholeVideo(path.stem, json.loads(path.read_text(encoding="utf-8")))
        for path in folder.glob(f"{MODEL}-*.json")
    ]
    return sorted(found, key=lambda video: -video.seconds)


def page_rows(videos: list[WholeVideo]) -> Iterator[list[object]]:
    """Steps, seconds and memory of every video."""
    for video in videos:
        density, dense = video.density, video.step_seconds(sparse=False)
        sparse = video.step_seconds(sparse=True)
        yield [
            f"{video.count(sparse=False)} dense, {video.count(sparse=True)} sparse",
            "" if density is None else f"{density:.3f}",
            ", ".join(video.run["report"]["backends"]),
            video.offload,
            "" if dense is None else f"{dense:.1f}",
            "" if sparse is None else f"{sparse:.1f}",
            f"{video.other_seconds:.0f}",
            f"{video.seconds:.0f}",
            f"{video.peak_memory_gib:.1f}",
        ]


def readme_rows(videos: list[WholeVideo]) -> Iterator[list[object]]:
    """Sparse videos against the dense one of the same size, steps and offloading."""
    for video in videos:
        if video.density is None:
            continue
        dense = [other for other in videos if other.density is None and _alike(video, other)]
        for other in dense:
            yield [
                video.device,
                video.frames,
                f"{video.count(sparse=True)} of {video.run['num_inference_steps']}",
                f"{video.density:.3f}",
                f"{other.seconds:.0f} s",
                f"{video.seconds:.0f} s",
                f"{other.seconds / video.seconds:.2f}x",
            ]


def memory_by_offload(videos: list[WholeVideo]) -> str:
    """One sentence: the peak of every way to offload."""
    peaks: dict[str, float] = {}
    for video in videos:
        peaks[video.offload] = max(video.peak_memory_gib, peaks.get(video.offload, 0.0))
    by_size = sorted(peaks.items(), key=lambda peak: -peak[1])
    listed = ", ".join(f"{gib:.1f} GiB with `--offload {name}`" for name, gib in by_size)
    return f"Peak GPU memory of these videos: {listed}."


def _alike(video: WholeVideo, other: WholeVideo) -> bool:
    keys = ("height", "width", "num_frames", "num_inference_steps", "true_cfg_scale")
    same_run = all(video.run[key] == other.run[key] for key in keys)
    return same_run and (video.device, video.offload) == (other.device, other.offload)
