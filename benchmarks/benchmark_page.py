"""Turns result files into Markdown: the page of benchmarks, and the table of the README."""

import itertools
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from benchmarks.results_files import AUTHORS, ProblemRows, ResultFile, ResultRow, describe_video
from benchmarks.whole_videos import WholeVideo, memory_by_offload, readme_videos, videos_table
from xattn_video.measure.dense_baselines import STOCK
from xattn_video.reporting.pages import render
from xattn_video.reporting.tables import Table, figure

T = TypeVar("T")
SpeedupLine = list[tuple[int, float]]
"""The number of tokens and the speed-up over the best dense kernel at each size of a sweep."""
IMAGES = "images/benchmarks"
README_COLUMNS = ("what", "hardware", "density", "dense", "sparse", "speed-up", "over stock")
_TEMPLATE = Path(__file__).with_name("page.md.jinja")


def render_page(files: list[ResultFile], videos: list[WholeVideo]) -> str:
    """The whole page; sections without measurements are omitted."""
    by_device = itertools.groupby(files, lambda file: file.device)
    return render(
        _TEMPLATE,
        devices=[(device, list(found)) for device, found in by_device],
        videos=videos,
        images=IMAGES,
        figure_names=figure_names,
        dense_table=dense_table,
        sparse_table=sparse_table,
        sweep_table=sweep_table,
        crossings=crossings,
        selection_table=selection_table,
        describe_step=describe_step,
        step_table=step_table,
        videos_table=videos_table,
        memory_by_offload=memory_by_offload,
    )


def render_readme_table(files: list[ResultFile], videos: list[WholeVideo]) -> str:
    """The README's table: attention of one layer, whole denoising steps, whole videos."""
    rows = (*_layer_rows(files), *_step_rows(files), *readme_videos(videos))
    return Table(README_COLUMNS, rows, num_left=len(README_COLUMNS)).markdown()


def figure_names(file: ResultFile) -> dict[str, str]:
    """{kind or problem: name of the picture} for a file."""
    names = {problem.name: f"{file.stem}-{problem.name}.png" for problem in file.single_problems}
    if file.sweep:
        names["sweep"] = f"{file.stem}-by-length.png"
    return names


def dense_table(problem: ProblemRows) -> str:
    """The table of the dense kernels, the fastest first."""
    columns: dict[str, Callable[[ResultRow], str]] = {
        "dense": lambda row: row["backend"],
        "ms": _ms,
        "TFLOP/s": lambda row: f"{row['tflops']:.3g}",
        "extra GiB": _gib,
    }
    return _markdown(sorted(problem.select("dense"), key=lambda row: row["latency_ms"]), columns)


def sparse_table(problem: ProblemRows) -> str:
    """The table of XAttention and its parts; parts that were not timed are empty."""
    estimates = {row["stride"]: row for row in problem.select("scoring", backend=AUTHORS)}
    rows = problem.select("xattention") + [
        row
        for stride, row in estimates.items()
        if not problem.find("xattention", backend=AUTHORS, stride=stride)
    ]

    def selection(row: ResultRow) -> str:
        return "included" if row["backend"] == AUTHORS else _ms(problem.part("selection", row))

    columns: dict[str, Callable[[ResultRow], str]] = {
        "density": lambda row: figure(row.get("density"), ".3f"),
        "stride": estimate_of,
        "backend": lambda row: row["backend"],
        "scoring": lambda row: _ms(row if row["name"] == "scoring" else problem.scoring_of(row)),
        "selection": selection,
        "attention": lambda row: _ms(problem.part("attention", row, backend=row["backend"])),
        "total": lambda row: _ms(row if row["name"] == "xattention" else None),
        "over best dense": lambda row: _over(row, problem.best_dense),
        "over stock": lambda row: _over(row, problem.find("dense", backend=STOCK)),
        "extra GiB": _gib,
    }
    return _markdown(rows, columns)


def sweep_table(sweep: list[ProblemRows]) -> str:
    """The table of XAttention beside the best dense kernel, by size."""
    columns: dict[str, Callable[[tuple[ResultRow, ResultRow | None]], str]] = {
        "tokens": lambda pair: f"{pair[0]['n']:,}",
        "best dense": lambda pair: _ms_by(pair[1], unit=""),
        "density": lambda pair: f"{pair[0]['density']:.3f}",
        "stride": lambda pair: estimate_of(pair[0]),
        "backend": lambda pair: pair[0]["backend"],
        "total": lambda pair: _ms(pair[0]),
        "over best dense": lambda pair: _over(*pair),
    }
    pairs = [(row, p.best_dense) for p in sweep for row in p.select("xattention")]
    return _markdown(pairs, columns)


def crossings(sweep: list[ProblemRows]) -> Iterator[str]:
    """For each line of the sweep, the size from which it beats the best dense kernel."""
    for (backend, stride, density), points in speedup_lines(sweep).items():
        losing = [length for length, speedup in points if speedup <= 1]
        winning = [length for length, _ in points if length > max(losing, default=0)]
        found = f"from {winning[0]:,} tokens" if winning else "at no measured size"
        yield f"`{backend}`, stride {stride}, density {density:.3g}: faster than dense {found}"


def speedup_lines(sweep: list[ProblemRows]) -> dict[tuple[str, str, float], SpeedupLine]:
    """{(backend, stride, density): its line}."""
    lines: defaultdict[Any, SpeedupLine] = defaultdict(list)
    for problem in sweep:
        best = problem.best_dense
        if best is None:
            continue
        for row in problem.select("xattention"):
            density = row.get("wanted_density", row["density"])
            found = row["n"], best["latency_ms"] / row["latency_ms"]
            lines[row["backend"], estimate_of(row), density].append(found)
    return lines


def selection_table(problems: list[ProblemRows]) -> str:
    """The table of how much of a model's own attention the selections keep."""
    shares = {
        "density": "density",
        "density of sampled rows": "sampled_density",
        "kept mass": "kept_mass",
        "lowest kept mass": "least_kept_mass",
        "formula's density": "formula_density",
        "formula's kept mass": "formula_kept_mass",
        "oracle's density": "oracle_density",
    }
    columns: dict[str, Callable[[ResultRow], object]] = {
        "inputs": lambda row: row["problem"],
        "tokens": lambda row: row["n"],
        "stride": estimate_of,
        "tau": lambda row: f"{row['threshold']:g}",
        **{name: lambda row, key=key: f"{row[key]:.3f}" for name, key in shares.items()},
    }
    return _markdown([row for p in problems for row in p.select("selection")], columns)


def describe_step(step: ResultRow) -> str:
    """A description of the video and of the transformer."""
    return (
        f"{describe_video(step)} ({step['n']:,} tokens), {sum(step['layers'])} layers with random "
        f"weights{_compiled(step)}"
    )


def step_table(steps: list[ResultRow]) -> str:
    """The table of whole steps, compared with the stock step and the dense step."""
    phases = {row["phase"]: row for row in steps if row["phase"] in ("stock", "dense")}
    stock, dense = phases.get("stock"), phases.get("dense")
    columns: dict[str, Callable[[ResultRow], str]] = {
        "step": lambda row: row["phase"],
        "backend": lambda row: row["backend"] or "sdpa",
        "stride": lambda row: estimate_of(row) if row["phase"] == "sparse" else "",
        "density": lambda row: figure(row.get("density"), ".3f"),
        "s": lambda row: f"{row['latency_ms'] / 1e3:.2f}",
        "over stock": lambda row: _over(row, stock),
        "over dense": lambda row: "" if row is stock else _over(row, dense),
        "peak GiB": lambda row: figure(row["peak_memory_gib"], ".1f"),
    }
    return _markdown(steps, columns)


def _layer_rows(files: list[ResultFile]) -> Iterator[tuple[str, ...]]:
    """The fastest dense kernel against the fastest backend, for every single problem."""
    for file in files:
        for problem in [*file.single_problems, *file.sweep[-1:]]:
            dense = problem.best_dense
            for total in _best_totals(problem) if dense is not None else ():
                yield (
                    f"attention of one layer, {total['n']:,} tokens, {total['dtype']}",
                    file.device,
                    f"{total['density']:.3f}",
                    _ms_by(dense),
                    _ms_by(total),
                    _over(total, dense),
                    _over(total, problem.find("dense", backend=STOCK)),
                )


def _best_totals(problem: ProblemRows) -> Iterator[ResultRow]:
    """The row of the fastest backend at each density, at the smallest and most exact stride."""
    wanted: dict[float, list[ResultRow]] = {}
    for row in problem.select("xattention"):
        if row["backend"] != AUTHORS:
            wanted.setdefault(row.get("wanted_density", row["threshold"]), []).append(row)
    for same in wanted.values():
        yield min(same, key=lambda row: (row["stride"], row["latency_ms"]))


def _step_rows(files: list[ResultFile]) -> Iterator[tuple[str, ...]]:
    """Whole sparse steps against the dense steps of the same file."""
    for file in files:
        phases = {row["phase"]: row for row in file.steps if row["phase"] != "sparse"}
        for row in file.steps if {"stock", "dense"} <= set(phases) else ():
            if row["phase"] == "sparse" and row["backend"] != AUTHORS:
                yield (
                    f"a denoising step, {describe_video(row)}{_compiled(row)}",
                    file.device,
                    f"{row['density']:.3f}",
                    f"{phases['dense']['latency_ms'] / 1e3:.1f} s",
                    f"{row['latency_ms'] / 1e3:.1f} s",
                    _over(row, phases["dense"]),
                    _over(row, phases["stock"]),
                )


def estimate_of(row: ResultRow) -> str:
    """The stride, and the precision of scoring if it is not exact."""
    precision = row.get("precision", "exact")
    return str(row["stride"]) if precision == "exact" else f"{row['stride']} ({precision})"


def _markdown(items: Iterable[T], columns: Mapping[str, Callable[[T], object]]) -> str:
    return Table.of(items, columns, num_left=len(columns)).markdown()


def _compiled(step: ResultRow) -> str:
    return ", torch.compile" if step.get("compiled") else ""


def _ms(row: ResultRow | None) -> str:
    if row is None:
        return ""
    found = row["latency_ms"]
    return f"{found:.0f}" if found >= 1000 else f"{found:.3g}"


def _ms_by(row: ResultRow | None, unit: str = " ms") -> str:
    return "" if row is None else f"{_ms(row)}{unit} ({row['backend']})"


def _gib(row: ResultRow) -> str:
    return figure(row["extra_memory_gib"], ".2f")


def _over(row: ResultRow, other: ResultRow | None) -> str:
    """The speed-up over another row as text; empty for a mere part and for that row itself."""
    if other is None or other is row or row["name"] == "scoring":
        return ""
    return f"{other['latency_ms'] / row['latency_ms']:.2f}x"
