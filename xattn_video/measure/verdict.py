"""The verdict on a sparse run: similarity to dense, speed here, and speed at full size."""

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any

from xattn_video.measure.comparison_rows import MethodRow
from xattn_video.measure.expected_seconds import expected_speedup
from xattn_video.measure.full_size import read_full_size
from xattn_video.policy.settings import SparseSettings
from xattn_video.reporting.web_page import Figure

# PSNR in dB above which a difference is commonly held to be hard to see, or visible if looked for.
_HARD_TO_SEE, _TO_BE_SEEN = 40.0, 30.0
# Steps whose times differ by less than this share count as equally fast.
_NOISE = 0.03


@dataclass(frozen=True, slots=True)
class FullSize:
    """A whole video at full size, dense and sparse, as committed in benchmarks/results.

    Attributes:
        video, device: Size of the video, and the GPU.
        weights: Kind of the model's weights.
        density: Kept over valid blocks of the sparse steps.
        dense_seconds, sparse_seconds: Seconds from the prompt to the frames.
        steps, sparse_steps: Number of denoising steps, and of sparse ones.
        sources: The result files.
    """

    video: str
    device: str
    weights: str
    density: float
    dense_seconds: float
    sparse_seconds: float
    steps: int
    sparse_steps: int
    sources: tuple[str, ...]

    @classmethod
    def read(cls) -> "FullSize":
        """The measurement that ships with the package."""
        return cls.of_record(read_full_size("whole"))

    @classmethod
    def of_record(cls, record: Mapping[str, Any]) -> "FullSize":
        """The measurement from plain values."""
        return cls(**{**record, "sources": tuple(record["sources"])})

    @property
    def figure(self) -> Figure:
        """The speed-up at full size, for a reader who ran something smaller."""
        return Figure(
            f"{self.dense_seconds / self.sparse_seconds:.2f}x",
            "speed measured at full size",
            f"{self.video}, {self.device}: {self.sparse_seconds:.0f} s per video instead of "
            f"{self.dense_seconds:.0f} s, with density {self.density:.2f}; other settings have "
            f"another density and speed. {self.weights.capitalize()} weights show speed only",
        )


def full_size_figure(sparse: SparseSettings | None) -> Figure:
    """The speed-up at full size: expected with these settings, or else the measured one."""
    expected = None if sparse is None else expected_speedup(sparse)
    return expected or FullSize.read().figure


def verdict(row: MethodRow, record: Mapping[str, Any]) -> dict[str, Figure]:
    """Up to three figures for one sparse method, by a short name.

    Args:
        row: The method's row of the table.
        record: The content of results.json.
    """
    found = {"picture": _nearness(row)}
    here = _speed_here(row, record)
    if here is not None:
        found["speed here"] = here
    if not _at_full_size(record):
        found["full size"] = full_size_figure(row.method.sparse)
    return found


def _nearness(row: MethodRow) -> Figure:
    if row.identical or row.psnr is None:
        return Figure(
            "identical", "to dense", "every frame is identical to the dense video, bit for bit"
        )
    if row.psnr >= _HARD_TO_SEE:
        words = "the difference is hard to see"
    elif row.psnr >= _TO_BE_SEEN:
        words = "small differences are visible on close inspection"
    else:
        words = "the difference shows"
    ssim = "" if row.ssim is None else f"SSIM {row.ssim:.4f}; "
    return Figure(f"{row.psnr:.1f} dB", "PSNR against dense", f"{ssim}{words}")


def _speed_here(row: MethodRow, record: Mapping[str, Any]) -> Figure | None:
    """The speed of a sparse step against a dense one, from medians; None if not measured."""
    dense = _step_seconds(record, "dense", "dense_step_seconds")
    sparse = _step_seconds(record, row.method.name, "sparse_step_seconds")
    if dense is None or sparse is None:
        return None
    blocks = "" if row.density is None else f" with {row.density:.0%} of the blocks"
    times = (
        f"a sparse step takes {sparse:.2f} s{blocks}, a dense one {dense:.2f} s "
        f"({record['device']}, {record['dtype']})"
    )
    ratio = dense / sparse
    if ratio > 1 + _NOISE:
        words = "sparse is faster here"
    elif ratio >= 1 - _NOISE:
        words = "no gain here"
    else:
        words = "sparse is slower here"
        if row.density is not None:
            left_out = 1 - row.density
            words += (
                f": leaving out {left_out:.0%} of the blocks saves less "
                "time than selecting blocks costs"
            )
    return Figure(f"{ratio:.2f}x", "speed of a sparse step on this machine", f"{times}; {words}")


def _step_seconds(record: Mapping[str, Any], method: str, name: str) -> float | None:
    found = [video[name] for video in record["videos"] if video["method"] == method]
    measured = [seconds for seconds in found if seconds is not None]
    return median(measured) if measured else None


def _at_full_size(record: Mapping[str, Any]) -> bool:
    """Whether the run itself has the size that sparse attention is meant for."""
    return record["device"] not in ("cpu", "mps") and record["video_tokens"] >= 2**15
