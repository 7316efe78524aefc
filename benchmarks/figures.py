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
    sparse = problem.select("xattention")
    height = 0.34 * (len(dense) + len(sparse)) + 1.4
    figure = Figure(figsize=(7.5, height), layout="constrained")
    axes = figure.add_subplot()
    drawn = set()
    for position, row in enumerate(dense):
        axes.barh(position, row["latency_ms"], color=_COLOURS["dense"])
        drawn.add("dense")
    for position, row in enumerate(sparse, len(dense)):
        start = 0.0
        for part, length in _split(problem, row).items():
            axes.barh(position, length, left=start, color=_COLOURS[part])
            start += length
            drawn.add(part)
    labels = [row["backend"] for row in dense]
    labels += [f"{r['backend']}, {r['density']:.3f}, S={estimate_of(r)}" for r in sparse]
    axes.set_yticks(range(len(labels)), labels)
    axes.invert_yaxis()
    axes.set(xlabel="ms", title=f"{problem.first['n']:,} tokens, {device}")
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
