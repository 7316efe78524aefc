"""The report's plot: the difference of each sparse run's scores from the dense run's."""

from collections.abc import Sequence
from pathlib import Path
from typing import TypeAlias

from eval_vbench.dimensions import dimensions
from eval_vbench.run_comparison import CompleteRun, SparseResult, shares_right
from xattn_video.files import write_figure

Panels: TypeAlias = dict[str, dict[str, dict[str, float]]]
"""Title -> run -> name -> score; the first run is the dense one."""

# The least limit of an axis, so that tiny differences look small.
_LEAST_LIMIT = 0.0005


def plot_report(path: Path, dense: CompleteRun, results: Sequence[SparseResult]) -> bool:
    """Draw VBench's normalised scores and the prompt checks; returns False if there are none."""
    panels: Panels = {}
    shared = [
        name for name in dense.scores if any(name in result.run.scores for result in results)
    ]
    if shared:
        panels["VBench's normalised scores"] = {
            run.label: {
                name: dimensions()[name].normalise(run.scores[name].score)
                for name in shared
                if name in run.scores
            }
            for run in (dense, *(result.run for result in results))
        }
    if shares_right(dense):
        panels["Shares of right prompt checks"] = {
            dense.label: shares_right(dense),
            **{result.run.label: result.checks for result in results},
        }
    if not panels:
        return False
    draw_differences(path, panels)
    return True


def draw_differences(path: Path, panels: Panels) -> None:
    """Draw one panel below the other: a bar for each run's difference from dense, by name.

    Differences are drawn because the scores themselves hardly differ.
    """
    from matplotlib.figure import Figure

    widths = [len(next(iter(series.values()))) for series in panels.values()]
    figure = Figure(
        figsize=(max(7.0, 1.25 * max(widths) + 2), 3.0 * len(panels)), layout="constrained"
    )
    axes_of = figure.subplots(len(panels), 1, squeeze=False)[:, 0]
    for axes, (title, series) in zip(axes_of, panels.items(), strict=True):
        (_, dense), *sparse = series.items()
        names = list(dense)
        width = 0.8 / max(1, len(sparse))
        for number, (label, values) in enumerate(sparse):
            places = [place - 0.4 + width * (number + 0.5) for place in range(len(names))]
            heights = [values.get(name, float("nan")) - dense[name] for name in names]
            bars = axes.bar(places, heights, width, label=label)
            axes.bar_label(bars, fmt=_difference, padding=2, fontsize="x-small")
        axes.axhline(0, color="0.4", linewidth=0.8)
        found = [abs(values[name] - dense[name]) for _, values in sparse for name in values]
        limit = 1.3 * max(_LEAST_LIMIT, *found, 0.0)
        labels = [f"{name.replace('_', chr(10))}\ndense {dense[name]:.4f}" for name in names]
        axes.set_xticks(range(len(names)), labels, fontsize="small")
        # The same width of bars in all panels.
        axes.set(xlim=(-0.5, max(widths) - 0.5), ylim=(-limit, limit))
        axes.set(title=title, ylabel="sparse minus dense")
    figure.legend(
        *axes_of[0].get_legend_handles_labels(),
        loc="outside lower center",
        ncols=2,
        frameon=False,
    )
    write_figure(path, figure)


def _difference(height: float) -> str:
    return f"{height:+.4f}" if height else "0"
