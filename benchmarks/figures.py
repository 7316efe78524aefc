"""Draws the pictures of result files: time by part, and speed-up by number of tokens."""

from pathlib import Path

from matplotlib.figure import Figure

from benchmarks.benchmark_page import estimate_of, figure_names, speedup_lines
from benchmarks.results_files import AUTHORS, ProblemRows, ResultFile, ResultRow

_COLOURS = {
    "dense": "0.7",
    "scoring": "#4477aa",
    "selection": "#ccbb44",
    "attention": "#228833",
    "scoring not timed": "#a8d0a8",
}


def draw_figures(files: list[ResultFile], folder: Path) -> dict[Path, Figure]:
    """{file to write: its picture} for every picture that the page shows."""
    figures: dict[Path, Figure] = {}
    for file in files:
        names = figure_names(file)
        for problem in file.single_problems:
            figures[folder / names[problem.name]] = draw_parts(problem, file.device)
        if file.sweep:
            figures[folder / names["sweep"]] = draw_speedups(file.sweep, file.device)
    return figures


def draw_parts(problem: ProblemRows, device: str) -> Figure:
    """One bar for each dense kernel and each sparse run; sparse bars are split into parts."""
    dense = sorted(problem.select("dense"), key=lambda row: -row["latency_ms"])
    bars = [(row["backend"], {"dense": row["latency_ms"]}) for row in dense]
    for row in problem.select("xattention"):
        label = f"{row['backend']}, {row['density']:.3f}, S={estimate_of(row)}"
        bars.append((label, _split(problem, row)))
    figure = Figure(figsize=(7.5, 0.34 * len(bars) + 1.4), layout="constrained")
    axes = figure.add_subplot()
    for position, (_, parts) in enumerate(bars):
        start = 0.0
        for part, length in parts.items():
            axes.barh(position, length, left=start, color=_COLOURS[part])
            start += length
    axes.set_yticks(range(len(bars)), [label for label, _ in bars])
    axes.invert_yaxis()
    axes.set(xlabel="ms", title=f"{problem.first['n']:,} tokens, {device}")
    drawn = {part for _, parts in bars for part in parts}
    for part, colour in _COLOURS.items():
        if part in drawn:
            axes.barh(0, 0, color=colour, label=part)
    figure.legend(loc="outside lower center", ncols=len(drawn), frameon=False)
    return figure


def _split(problem: ProblemRows, total: ResultRow) -> dict[str, float]:
    """Milliseconds of a sparse run's parts; attention is the total without the other parts."""
    found = {"scoring": problem.scoring_of(total)}
    if found["scoring"] is None:
        return {"scoring not timed": total["latency_ms"]}
    if total["backend"] != AUTHORS:
        found["selection"] = problem.part("selection", total)
    parts = {name: row["latency_ms"] for name, row in found.items() if row is not None}
    parts["attention"] = max(0.0, total["latency_ms"] - sum(parts.values()))
    return parts


def draw_speedups(sweep: list[ProblemRows], device: str) -> Figure:
    """Speed-up over the best dense kernel, with a line for each backend, stride and density."""
    figure = Figure(figsize=(7.5, 4.2), layout="constrained")
    axes = figure.add_subplot()
    for (backend, stride, density), points in speedup_lines(sweep).items():
        label = f"{backend}, density {density:.3g}, S={stride}"
        axes.plot(*zip(*points, strict=True), marker="o", label=label)
    axes.axhline(1, color="0.6", linewidth=1)
    axes.set_xscale("log", base=2)
    lengths = [problem.first["n"] for problem in sweep]
    axes.set_xticks(lengths, [f"{length // 1024}k" for length in lengths])
    axes.set(xlabel="tokens", ylabel="best dense / XAttention", ylim=(0, None), title=device)
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    return figure
