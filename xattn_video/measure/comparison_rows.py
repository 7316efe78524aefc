"""Summarises measurements: one row for each method, and its cells as text."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import mean, median
from typing import Any

from xattn_video.measure.comparison import Measurement
from xattn_video.measure.methods import DENSE, Method
from xattn_video.reporting.tables import Table, figure


@dataclass(frozen=True, slots=True)
class MethodRow:
    """The means over the videos of a method; None for what was not measured.

    Attributes:
        method: The method.
        num_videos: Number of videos.
        identical: Whether every frame equals the reference's, bit for bit.
        psnr, ssim, relative_vmaf, lpips, latent_error: See `Similarity` and `Measurement`.
        density, kept_mass: Likewise.
        seconds: Seconds of a whole video.
        speedup: Seconds of the dense videos over seconds of these videos.
        step_speedup: Median seconds of the dense videos' steps over those of sparse steps.
        peak_memory_gib: The largest of the videos.
        checks_right: Share of the demo model's checks that the videos pass.
        followed: Share of the prompts whose video passes all its checks.
        still_followed: Share of the prompts followed with dense attention that are followed here.
    """

    method: Method
    num_videos: int
    identical: bool
    psnr: float | None
    ssim: float | None
    relative_vmaf: float | None
    lpips: float | None
    latent_error: float | None
    density: float | None
    kept_mass: float | None
    seconds: float
    speedup: float | None
    step_speedup: float | None
    peak_memory_gib: float | None
    checks_right: float | None
    followed: float | None
    still_followed: float | None

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return asdict(replace(self, method=DENSE)) | {"method": self.method.to_dict()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "MethodRow":
        """The inverse of `to_dict`."""
        return cls(**values | {"method": Method.from_dict(values["method"])})


def summarise(measurements: Iterable[Measurement]) -> list[MethodRow]:
    """One row for each method, in the order in which they first ran."""
    groups: dict[str, list[Measurement]] = {}
    for measurement in measurements:
        groups.setdefault(measurement.method.name, []).append(measurement)
    dense = groups.get(DENSE.name, [])
    return [_summarise(group, dense) for group in groups.values()]


def _summarise(group: list[Measurement], dense: list[Measurement]) -> MethodRow:
    similarities = [m.similarity for m in group if m.similarity is not None]
    # Only dense videos of the same prompts and seeds; an interrupted run may have one more.
    cases = {(m.prompt, m.seed) for m in group}
    partners = {(m.prompt, m.seed): m for m in dense if (m.prompt, m.seed) in cases}
    is_reference = group[0].method == DENSE
    dense_step = over_measured(median, [m.dense_step_seconds for m in partners.values()])
    sparse_step = over_measured(median, [m.sparse_step_seconds for m in group])
    seconds = mean(m.seconds for m in group)
    judged = [m for m in group if m.attributes is not None]
    followed = {(m.prompt, m.seed): all(_checks(m)) for m in judged}
    still = [follows for case, follows in followed.items() if all(_checks(partners[case]))]
    return MethodRow(
        method=group[0].method,
        num_videos=len(group),
        identical=bool(similarities)
        and all(s.num_identical == s.num_frames for s in similarities),
        psnr=over_measured(mean, [s.psnr for s in similarities]),
        ssim=over_measured(mean, [s.ssim for s in similarities]),
        relative_vmaf=over_measured(mean, [s.relative_vmaf for s in similarities]),
        lpips=over_measured(mean, [s.lpips for s in similarities]),
        latent_error=over_measured(mean, [m.latent_error for m in group]),
        density=over_measured(mean, [m.density for m in group]),
        kept_mass=over_measured(mean, [m.kept_mass for m in group]),
        seconds=seconds,
        speedup=None if is_reference else mean(m.seconds for m in partners.values()) / seconds,
        step_speedup=dense_step / sparse_step if dense_step and sparse_step else None,
        peak_memory_gib=over_measured(max, [m.peak_memory_gib for m in group]),
        checks_right=over_measured(mean, [check for m in judged for check in _checks(m)]),
        followed=over_measured(mean, list(followed.values())),
        still_followed=None if is_reference else over_measured(mean, still),
    )


def _checks(measurement: Measurement) -> list[bool]:
    """All of the demo model's checks of a video, in a fixed order."""
    return [check for checks in (measurement.attributes or {}).values() for check in checks]


def over_measured(
    statistic: Callable[[list[float]], float], values: Sequence[float | None]
) -> float | None:
    """The statistic over the measured values; None if there are none."""
    measured = [float(value) for value in values if value is not None]
    return statistic(measured) if measured else None


_COLUMNS: dict[str, Callable[[MethodRow], str]] = {
    "setting": lambda row: row.method.label,
    "videos": lambda row: str(row.num_videos),
    "PSNR dB": lambda row: "identical" if row.identical else figure(row.psnr, ".2f"),
    "SSIM": lambda row: figure(row.ssim, ".4f"),
    "VMAF": lambda row: figure(row.relative_vmaf, ".1f", "%"),
    "LPIPS": lambda row: figure(row.lpips, ".4f"),
    "latent error": lambda row: figure(row.latent_error, ".4f"),
    "density": lambda row: figure(row.density, ".3f"),
    "kept mass": lambda row: figure(row.kept_mass, ".4f"),
    "s/video": lambda row: figure(row.seconds, ".2f" if row.seconds < 10 else ".1f"),
    "speed-up": lambda row: figure(row.speedup, ".2f", "x"),
    "step speed-up": lambda row: figure(row.step_speedup, ".2f", "x"),
    "GiB": lambda row: figure(row.peak_memory_gib, ".2f"),
    "checks right": lambda row: figure(row.checks_right, ".1%"),
    "followed": lambda row: figure(row.followed, ".1%"),
    "still followed": lambda row: figure(row.still_followed, ".1%"),
}


def comparison_table(rows: Sequence[MethodRow]) -> Table:
    """The table of all rows; a column without any measurement is omitted."""
    return Table.of(rows, _COLUMNS, keep_empty=False)
