"""Picture quality against time for many settings: the demo model's PSNR, HunyuanVideo's seconds.

The seconds are modelled from measured steps of HunyuanVideo at 720x1280 and 129 frames, by linear
interpolation and extrapolation in the density of the sparse output.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure

from benchmarks.results_files import RESULTS, ResultRow, read_json, read_results, rows_of
from benchmarks.step_tables import NUM_STEPS, mean_step_ms
from xattn_video.policy.settings import SparseSettings

VIDEOS = RESULTS / "quality_fewer" / "fewer-blocks-256-h100.json"
NAME = "fewer-blocks-front.png"
Line = Callable[[float], float]
"""Milliseconds of a kind of step as a linear function of the density."""


@dataclass(frozen=True, slots=True)
class Point:
    """One setting.

    Attributes:
        kind: ``"plain"``, ``"compensated"`` or ``"with refreshes"``.
        label: The setting.
        budget: Share of the blocks computed after the warm-up.
        seconds: Denoising time of a 50-step video.
        psnr: PSNR against dense attention in dB.
    """

    kind: str
    label: str
    budget: float
    seconds: float
    psnr: float


def read_points(videos: Path = VIDEOS) -> list[Point]:
    """Points of plain XAttention, and of first-order compensation with the Hilbert order."""
    record = read_json(videos)
    num_steps = record["video"]["num_inference_steps"]
    lines, dense_ms = _measured_steps()
    points = []
    for row in record["rows"]:
        given = row["method"]["sparse"]
        if given is None or given["warmup_steps"] != SparseSettings().warmup_steps:
            continue
        settings = SparseSettings(**given)
        kind = _kind(settings)
        if kind is None:
            continue
        density = settings.density or row["density"]
        ms = {phase: line(density) for phase, line in lines[kind == "plain"].items()}
        mean_ms = mean_step_ms(settings, ms, dense_ms, num_steps)
        warmup = settings.warmup_steps
        seconds = (warmup * dense_ms + (NUM_STEPS - warmup) * mean_ms) / 1e3
        points.append(Point(kind, row["method"]["label"], row["density"], seconds, row["psnr"]))
    return points


def draw_front(points: list[Point]) -> Figure:
    """Draw PSNR against seconds, with one colour for each kind and the budget at each point."""
    figure = Figure(figsize=(7.5, 4.5), layout="constrained")
    axes = figure.add_subplot()
    colours = {"plain": "0.5", "compensated": "#4477aa", "with refreshes": "#228833"}
    for kind, colour in colours.items():
        own = sorted((p for p in points if p.kind == kind), key=lambda p: p.seconds)
        axes.plot([p.seconds for p in own], [p.psnr for p in own], "o", color=colour, label=kind)
        for point in own:
            axes.annotate(
                f"{point.budget:.2f}",
                (point.seconds, point.psnr),
                xytext=(4, 4),
                textcoords="offset points",
                color=colour,
                fontsize=8,
            )
    axes.set(
        xlabel="seconds of denoising, HunyuanVideo 720x1280x129, 50 steps, H100 (modelled)",
        ylabel="PSNR of the demo model, dB",
        title="Picture quality against time; labels give the share of blocks computed",
    )
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    return figure


def _kind(settings: SparseSettings) -> str | None:
    """The kind of a setting's point; None for combinations whose steps were not measured."""
    if settings.refresh_every is None and settings.token_order == "raster":
        return "plain" if settings.compensation == "none" else None
    if settings.token_order == "raster" or settings.compensation != "first-order":
        return None
    return "compensated" if settings.refresh_every is None else "with refreshes"


def _measured_steps() -> tuple[dict[bool, dict[str, Line]], float]:
    """{is plain: {phase: its line}}, and the milliseconds of a dense step."""
    rows, plain = rows_of(read_results(RESULTS / "fewer_blocks")), rows_of(read_results())

    def of(rows: list[ResultRow], phase: str) -> list[ResultRow]:
        return [row for row in rows if row.get("phase") == phase]

    taus = [row for row in of(plain, "sparse") if row["threshold"] in (0.345, 0.455)][:2]
    choose, reuse = of(rows, "choose"), of(rows, "reuse")
    lines = {"choose": _line(choose[0], choose), "reuse": _line(reuse[0], reuse)}
    for phase in ("between", "refresh"):
        lines[phase] = _line(of(rows, phase)[0], reuse)
    # The last warm-up step refreshes too.
    lines["prime"] = lines["refresh"]
    dense_ms = of(rows, "dense")[0]["latency_ms"]
    return {True: {"choose": _line(taus[0], taus)}, False: lines}, dense_ms


def _line(row: ResultRow, pair: list[ResultRow]) -> Line:
    """The line through a measured step, with the slope of a pair of steps."""
    first, second = pair
    rise = second["latency_ms"] - first["latency_ms"]
    slope = rise / (second["density"] - first["density"])
    return lambda density: row["latency_ms"] + slope * (density - row["density"])
