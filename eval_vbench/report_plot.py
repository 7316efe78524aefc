"""A report's plot."""

from collections.abc import Sequence
from pathlib import Path

from eval_vbench.dimensions import dimensions
from eval_vbench.run_comparison import CompleteRun, SparseResult, shares_right
from xattn_video.files import write_figure


def plot_report(path: Path, dense: CompleteRun, results: Sequence[SparseResult]) -> bool:
    """Draw bars of VBench's normalised scores and of the prompt checks; False with neither."""
    panels: dict[str, dict[str, dict[str, float]]] = {}
    shared = [
        name for name in dense.scores if any(name in result.run.scores for result in results)
    ]
    if shared:
        panels["VBench, normalised score"] = {
            run.label: {
                name: dimensions()[name].normalise(run.scores[name].score)
                for name in shared
                if name in run.scores
            }
            for run in (dense, *(result.run for result in results))
        }
    if shares_right(dense):
        panels["prompt checks, share right"] = {
            dense.label: shares_right(dense),
            **{result.run.label: result.checks for result in results},
        }
    if not panels:
        return False
    _draw(path, panels)
    return True


def _draw(path: Path, panels: dict[str, dict[str, dict[str, float]]]) -> None:
    """One panel below the other: a group of bars for each name, a bar for each run."""
    from matplotlib.figure import Figure

    widths = [len(next(iter(series.values()))) for series in panels.values()]
    figure = Figure(
        figsize=(max(6.0, 1.1 * max(widths) + 2), 3.6 * len(panels)), layout="constrained"
    )
    axes_of = figure.subplots(len(panels), 1, squeeze=False)[:, 0]
    for axes, (title, series) in zip(axes_of, panels.items(), strict=True):
        names = list(next(iter(series.values())))
        width = 0.8 / len(series)
        for number, (label, values) in enumerate(series.items()):
            places = [place - 0.4 + width * (number + 0.5) for place in range(len(names))]
            heights = [values.get(name, float("nan")) for name in names]
            axes.bar(places, heights, width, label=label)
        labels = [name.replace("_", "\n") for name in names]
        axes.set_xticks(range(len(names)), labels, fontsize="small")
        # Bars of one width in all panels.
        axes.set(title=title, xlim=(-0.5, max(widths) - 0.5), ylim=(0, 1.05))
    figure.legend(
        *axes_of[0].get_legend_handles_labels(),
        loc="outside lower center",
        ncols=2,
        frameon=False,
    )
    write_figure(path, figure)
