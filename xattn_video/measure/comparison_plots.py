"""Plots of a comparison."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from xattn_video.files import write_figure
from xattn_video.measure.comparison_rows import MethodRow
from xattn_video.measure.frames import MAX_PSNR
from xattn_video.measure.methods import DENSE_AGAIN
from xattn_video.reporting.web_page import round_limits

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Densities: TypeAlias = Sequence[Sequence[float | None]]
"""`[layers][steps]`; None if the layer was not sparse."""

_Line: TypeAlias = tuple[int, int, str, str]
"""Stride, warm-up steps, other settings, and "tau", "density" or "schedule"."""


def write_plots(
    stem: Path, rows: Sequence[MethodRow], densities: Mapping[str, Densities]
) -> list[Path]:
    """Write every plot that has measurements.

    Args:
        stem: Beginning of the files' paths, such as ``plots/demo``.
        rows: The rows of the table.
        densities: {name of a method: density by layer and step}.

    Returns:
        The written files.
    """
    sparse = [row for row in rows if row.density is not None and row.psnr is not None]
    if not sparse:
        return []
    noise = [row for row in rows if row.method == DENSE_AGAIN]
    figures = {"psnr-density": _psnr_over_density(sparse, noise)}
    plain = [row for row in sparse if _line(row)[2:] == ("", "tau")]
    if len({_line(row) for row in plain}) > 1:
        figures["psnr-grid"] = _psnr_grid(plain)
    shown = _rows_to_show([row for row in plain if row.method.name in densities])
    if shown:
        figures["density-layers"] = _density_by_layer(
            {row.method.label: densities[row.method.name] for row in shown}
        )
    paths = [stem.with_name(f"{stem.name}-{name}.png") for name in figures]
    for path, figure in zip(paths, figures.values(), strict=True):
        write_figure(path, figure)
    return paths


def _psnr_over_density(rows: Sequence[MethodRow], noise: Sequence[MethodRow]) -> "Figure":
    """A line for each kind of setting, with a point for each threshold, density and refresh."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 5), layout="constrained")
    axes = figure.add_subplot()
    palette = colormaps["tab20" if len({_line(row)[1:] for row in rows}) > 10 else "tab10"]
    lines: dict[_Line, list[MethodRow]] = {}
    for row in rows:
        lines.setdefault(_line(row), []).append(row)
    strides = sorted({line[0] for line in lines})
    colours = sorted({line[1:] for line in lines})
    for (stride, warmup, others, share), points in sorted(lines.items()):
        points = sorted(points, key=lambda row: row.density or 0)
        at = f"stride {stride}" if len(strides) > 1 else ""
        axes.plot(
            [row.density or 0 for row in points],
            [row.psnr or 0 for row in points],
            color=palette(colours.index((warmup, others, share)) % palette.N),
            linestyle=("-", "--", ":", "-.")[strides.index(stride) % 4],
            marker="osD^"[strides.index(stride) % 4],
            label=", ".join(filter(None, (share, others, f"warm-up {warmup}", at))),
        )
        # Only one line is labelled: lines of other strides and warm-ups run near it.
        for row in points if stride == strides[0] and warmup == colours[-1][0] else ():
            axes.annotate(
                _point(row),
                (row.density or 0, row.psnr or 0),
                textcoords="offset points",
                xytext=(-4, 6),
                ha="right",
                fontsize=8,
            )
    for row in noise:
        # At the largest PSNR nothing differs, and the line would only stretch the axis.
        if row.psnr is not None and row.psnr < MAX_PSNR:
            axes.axhline(row.psnr, color="0.5", linestyle="--", label=row.method.label)
    axes.margins(0.12)
    counted = "budget: density with refreshes counted as 1"
    settings = [row.method.sparse for row in rows]
    if not any(one is not None and one.refresh_every for one in settings):
        counted = "density of the sparse steps"
    axes.set(
        xlabel=f"{counted} (kept / valid blocks)",
        ylabel="PSNR against dense, dB",
        title="Closeness to dense attention\n(labels: threshold or density / refresh interval)",
    )
    axes.grid(color="0.9")
    figure.legend(loc="outside right upper", frameon=False)
    return figure


def _psnr_grid(rows: Sequence[MethodRow]) -> "Figure":
    """A heat map over threshold and warm-up steps, one for each stride."""
    from matplotlib.figure import Figure

    cells = {(*_line(row)[:2], _share(row)): row.psnr or 0 for row in rows}
    strides = sorted({stride for stride, _, _ in cells})
    warmups = sorted({warmup for _, warmup, _ in cells})
    taus = sorted({tau for _, _, tau in cells})
    figure = Figure(
        figsize=(2 + max(2.2, 0.7 + 0.75 * len(taus)) * len(strides), 1.7 + 0.6 * len(warmups)),
        layout="constrained",
    )
    panels = figure.subplots(1, len(strides), squeeze=False, sharey=True)[0]
    low, high = min(cells.values()), max(cells.values())
    image: Any = None
    for axes, stride in zip(panels, strides, strict=True):
        values = [
            [cells.get((stride, warmup, tau), math.nan) for tau in taus] for warmup in warmups
        ]
        image = axes.imshow(values, "viridis", aspect="auto", vmin=low, vmax=high)
        for y, line in enumerate(values):
            for x, value in enumerate(line):
                if not math.isnan(value):
                    colour = "black" if value > (low + high) / 2 else "white"
                    axes.text(x, y, f"{value:.1f}", ha="center", va="center", color=colour)
        axes.set_xticks(range(len(taus)), [f"{tau:g}" for tau in taus])
        axes.set_yticks(range(len(warmups)), [str(warmup) for warmup in warmups])
        axes.set(xlabel="threshold", title=f"stride {stride}")
    panels[0].set_ylabel("warm-up steps")
    figure.colorbar(image, ax=list(panels), label="PSNR, dB", pad=0.01)
    return figure


def _rows_to_show(rows: Sequence[MethodRow]) -> list[MethodRow]:
    """One row for each threshold, at the smallest stride and warm-up; others look alike."""
    places = {(*_line(row)[:2], _share(row)): row for row in rows}
    if not places:
        return []
    stride, warmup, _ = min(places)
    return [row for place, row in sorted(places.items()) if place[:2] == (stride, warmup)]


def _density_by_layer(grids: Mapping[str, Densities]) -> "Figure":
    """Density by step and layer, a panel for each method."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1.5 + max(3.4, 2.9 * len(grids)), 3.8), layout="constrained")
    panels = figure.subplots(1, len(grids), squeeze=False, sharey=True)[0]
    image: Any = None
    found = [cell for layers in grids.values() for row in layers for cell in row]
    sparse = [density for density in found if density is not None]
    low, high = round_limits(min(sparse), max(sparse), digits=1)
    for axes, (label, layers) in zip(panels, grids.items(), strict=True):
        values = [[math.nan if cell is None else cell for cell in layer] for layer in layers]
        axes.set_facecolor("0.82")
        image = axes.imshow(values, "viridis", vmin=low, vmax=high, aspect="auto")
        axes.set(xlabel="denoising step", title=label.replace(", ", "\n", 1))
        axes.locator_params(integer=True, nbins=6)
    panels[0].set_ylabel("layer")
    figure.colorbar(image, ax=list(panels), label="density (grey: dense)", pad=0.01)
    return figure


def _line(row: MethodRow) -> _Line:
    """The line of a sparse row; rows of a line differ only in threshold, density or refresh."""
    settings = row.method.sparse
    assert settings is not None
    share = "tau" if settings.density is None else "density"
    if not isinstance(_share(row), float | int):
        share = "schedule"
    # The first three parts of a label are the share, the warm-up and the stride.
    others = ", ".join(row.method.label.split(", ")[3:])
    if settings.refresh_every is not None:
        others = others.removesuffix(f" {settings.refresh_every}") + "es"
    return settings.stride, settings.warmup_steps, others, share


def _point(row: MethodRow) -> str:
    """The label of a point, different from the others of its line."""
    assert row.method.sparse is not None
    every, share = row.method.sparse.refresh_every, _share(row)
    text = f"{share:g}" if isinstance(share, float | int) else "schedule"
    return text + ("" if every is None else f" / {every}")


def _share(row: MethodRow) -> Any:
    """The threshold or density of a sparse row, or its schedule."""
    settings = row.method.sparse
    assert settings is not None
    return settings.threshold if settings.density is None else settings.density
