"""Turns result files into Markdown: the page of benchmarks, and the table of the README."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.results_files import AUTHORS, ProblemRows, ResultFile, ResultRow, describe_video
from benchmarks.whole_videos import (
    PAGE_HEADINGS,
    README_HEADINGS,
    WholeVideo,
    memory_by_offload,
    page_rows,
    readme_rows,
)
from xattn_video.measure.dense_baselines import STOCK

IMAGES = "images/benchmarks"
_INTRODUCTION = Path(__file__).with_name("page_introduction.md")


def render_page(files: list[ResultFile], videos: list[WholeVideo]) -> str:
    """The whole page; what no file holds is left out."""
    lines = [_INTRODUCTION.read_text(encoding="utf-8")]
    device = None
    for file in files:
        if file.device != device:
            device = file.device
            lines.append(f"## {device}\n")
        lines += _file_section(file)
    if videos:
        lines += _videos_section(videos)
    return "\n".join(lines)


def render_readme_table(files: list[ResultFile], videos: list[WholeVideo]) -> str:
    """The best dense kernel against the best backend; then whole steps and videos, if any."""
    rows = []
    for file in files:
        for problem in [*file.single_problems, *file.sweep[-1:]]:
            rows += list(_readme_rows(file, problem))
    headings = ["on", "tokens", "density", "best dense", "XAttention", "faster", "than stock"]
    lines = _table(headings, rows)
    steps = [row for file in files for row in _readme_steps(file)]
    if steps:
        lines += ["", "A whole denoising step of the transformer, with random weights:", ""]
        headings = ["on", "video", "density", "stock", "dense", "sparse"]
        lines += _table([*headings, "than stock", "than dense"], steps)
    whole = list(readme_rows(videos))
    if whole:
        title = "A whole video by `xattn-video generate`, decoding included, with random weights:"
        lines += ["", title, "", *_table(README_HEADINGS, whole), "", memory_by_offload(videos)]
    return "\n".join(lines)


def figure_names(file: ResultFile) -> dict[str, str]:
    """{kind or problem: name} of the pictures that a file gives."""
    names = {problem.name: f"{file.stem}-{problem.name}.png" for problem in file.single_problems}
    if file.sweep:
        names["sweep"] = f"{file.stem}-by-length.png"
    return names


def _file_section(file: ResultFile) -> Iterator[str]:
    content = file.content
    versions = {k: v for k, v in content["versions"].items() if v and k != "xattn-video"}
    packages = ", ".join(f"{name} {version}" for name, version in versions.items())
    yield (
        f"`benchmarks/results/{file.stem}.json`, commit {content['commit']}, {content['date']}; "
        f"Python {content['python']}, {packages}.\n"
    )
    yield f"```bash\n{content['command']}\n```\n"
    names = figure_names(file)
    for problem in file.single_problems:
        yield from _problem_section(problem, names[problem.name])
    if file.sweep:
        yield from _sweep_section(file.sweep, names["sweep"])
    if file.model_problems:
        yield from _model_section(file.model_problems)
    if file.steps:
        yield from _step_section(file.steps)
    for row in content["failures"]:
        what = " ".join(str(row[key]) for key in ("problem", "name", "backend") if row.get(key))
        yield f"- not measured: {what}: {' '.join(row['failure'].split())[:200]}"
    if content["failures"]:
        yield ""


def _problem_section(problem: ProblemRows, figure: str) -> Iterator[str]:
    yield f"### {_describe(problem)}\n"
    dense = [
        [row["backend"], _ms(row), f"{row['tflops']:.3g}", _gib(row)]
        for row in sorted(problem.select("dense"), key=lambda row: row["latency_ms"])
    ]
    yield from _table(["dense", "ms", "TFLOP/s", "extra GiB"], dense)
    yield ""
    headings = ["density", "stride", "by", "scoring", "selection", "attention", "total"]
    headings += ["over best dense", "over stock", "extra GiB"]
    sparse = [_sparse_row(problem, total) for total in problem.select("xattention")]
    estimates = {row["stride"]: row for row in problem.select("scoring", backend=AUTHORS)}
    sparse += [
        ["", stride, AUTHORS, _ms(row), "included", "", "", "", "", _gib(row)]
        for stride, row in estimates.items()
        if not problem.find("xattention", backend=AUTHORS, stride=stride)
    ]
    yield from _table(headings, sparse)
    yield f"\n![Time by part]({IMAGES}/{figure})\n"


def _sparse_row(problem: ProblemRows, total: ResultRow) -> list[object]:
    """One XAttention row with its parts; a part that was not timed for it stays empty."""
    same = {key: total.get(key) for key in ("stride", "precision", "threshold")}
    authors = total["backend"] == AUTHORS
    scoring = problem.scoring_of(total)
    selection = None if authors else problem.find("selection", **same)
    attention = problem.find("attention", backend=total["backend"], **same)
    return [
        f"{total['density']:.3f}",
        estimate_of(total),
        total["backend"],
        _ms(scoring),
        "included" if authors else _ms(selection),
        _ms(attention),
        _ms(total),
        _times(problem.speedup(total, problem.best_dense)),
        _times(problem.speedup(total, problem.find("dense", backend=STOCK))),
        _gib(total),
    ]


def _sweep_section(sweep: list[ProblemRows], figure: str) -> Iterator[str]:
    first = sweep[0].first
    heads = f"{first['heads']} heads of {first['head_dim']}, {first['dtype']}"
    yield f"### By number of tokens: {heads}\n"
    rows: list[list[object]] = []
    for problem in sweep:
        best = problem.best_dense
        for total in problem.select("xattention"):
            dense = "" if best is None else f"{_ms(best)} ({best['backend']})"
            speedup = _times(problem.speedup(total, best))
            rows.append(
                [
                    f"{problem.first['n']:,}",
                    dense,
                    f"{total['density']:.3f}",
                    estimate_of(total),
                    total["backend"],
                    _ms(total),
                    speedup,
                ]
            )
    headings = ["tokens", "best dense", "density", "stride", "by", "total", "over best dense"]
    yield from _table(headings, rows)
    yield ""
    yield from (f"- {line}" for line in _crossings(sweep))
    yield f"\n![Speed-up by number of tokens]({IMAGES}/{figure})\n"


def _crossings(sweep: list[ProblemRows]) -> Iterator[str]:
    """From which measured size on each line of the sweep beats the best dense kernel."""
    lines: dict[tuple[str, str, float], list[tuple[int, float]]] = {}
    for problem in sweep:
        for row in problem.select("xattention"):
            speedup = problem.speedup(row, problem.best_dense)
            wanted = row.get("wanted_density", row["density"])
            if speedup is not None:
                line = lines.setdefault((row["backend"], estimate_of(row), wanted), [])
                line.append((row["n"], speedup))
    for (backend, stride, density), points in lines.items():
        losing = [length for length, speedup in points if speedup <= 1]
        winning = [length for length, _ in points if length > max(losing, default=0)]
        found = f"from {winning[0]:,} tokens on" if winning else "at no size measured"
        yield f"`{backend}`, stride {stride}, density {density:.3g}: faster {found}"


def _model_section(problems: list[ProblemRows]) -> Iterator[str]:
    yield "### Selections on queries and keys of the demo model\n"
    yield (
        "Kept mass is the share of the true softmax that lies in the kept blocks, on sampled "
        "rows; the formula's selection is by scores in float32, the oracle's by the true mass.\n"
    )
    rows = []
    for problem in problems:
        for row in problem.select("selection"):
            shares = ("density", "sampled_density", "kept_mass", "least_kept_mass")
            shares += ("formula_density", "formula_kept_mass", "oracle_density")
            rows.append(
                [
                    problem.name,
                    row["n"],
                    estimate_of(row),
                    f"{row['threshold']:g}",
                    *(f"{row[share]:.3f}" for share in shares),
                ]
            )
    headings = ["inputs", "tokens", "stride", "tau", "density", "density of the sample"]
    headings += ["kept mass", "least", "formula's density", "its kept mass", "oracle's density"]
    yield from _table(headings, rows)
    yield ""


def _step_section(steps: list[ResultRow]) -> Iterator[str]:
    first = steps[0]
    yield (
        f"### A whole step, {describe_video(first)} "
        f"({first['n']:,} tokens), {sum(first['layers'])} layers with random weights"
        f"{_compiled(first)}\n"
    )
    phases = {row["phase"]: row for row in steps if row["phase"] in ("stock", "dense")}
    rows = []
    for row in steps:
        density = row.get("density")
        rows.append(
            [
                row["phase"],
                row["backend"] or "sdpa",
                estimate_of(row) if row["phase"] == "sparse" else "",
                "" if density is None else f"{density:.3f}",
                f"{row['latency_ms'] / 1e3:.2f}",
                _over(row, phases.get("stock")),
                "" if row["phase"] == "stock" else _over(row, phases.get("dense")),
                "" if row["peak_memory_gib"] is None else f"{row['peak_memory_gib']:.1f}",
            ]
        )
    headings = ["step", "by", "stride", "density", "s", "over stock", "over dense", "peak GiB"]
    yield from _table(headings, rows)
    yield ""


def _videos_section(videos: list[WholeVideo]) -> Iterator[str]:
    first = videos[0]
    packages = ", ".join(f"{k} {v}" for k, v in first.content["versions"].items())
    yield f"## Whole videos, {first.frames}\n"
    yield f"{first.device}; {packages}. Weights are random: the picture is noise.\n"
    yield "```bash\npython -m benchmarks.random_pipeline hunyuan-random"
    yield from (video.command for video in videos)
    yield "```\n"
    yield from _table(PAGE_HEADINGS, page_rows(videos))
    yield f"\n{memory_by_offload(videos)}"
    yield "A step's time is that of the fastest; the first of a kind compiles kernels.\n"


def _readme_rows(file: ResultFile, problem: ProblemRows) -> Iterator[list[object]]:
    ours = [row for row in problem.select("xattention") if row["backend"] != AUTHORS]
    best_dense = problem.best_dense
    if best_dense is None:
        return
    wanted: dict[float, list[ResultRow]] = {}
    for row in ours:
        wanted.setdefault(row.get("wanted_density", row["threshold"]), []).append(row)
    for same in wanted.values():
        # The smallest stride is the one that estimates best, and the default.
        total = min(same, key=lambda row: (row["stride"], row["latency_ms"]))
        yield [
            file.device,
            f"{problem.first['n']:,}",
            f"{total['density']:.3f}",
            f"{_ms(best_dense)} ms ({best_dense['backend']})",
            f"{_ms(total)} ms ({total['backend']})",
            _times(problem.speedup(total, best_dense)),
            _times(problem.speedup(total, problem.find("dense", backend=STOCK))),
        ]


def _readme_steps(file: ResultFile) -> Iterator[list[object]]:
    phases = {row["phase"]: row for row in file.steps if row["phase"] != "sparse"}
    stock, dense = phases.get("stock"), phases.get("dense")
    for row in file.steps:
        if row["phase"] == "sparse" and row["backend"] != AUTHORS and stock and dense:
            yield [
                file.device,
                f"{describe_video(row)}{_compiled(row)}",
                f"{row['density']:.3f}",
                *(f"{step['latency_ms'] / 1e3:.1f} s" for step in (stock, dense, row)),
                _over(row, stock),
                _over(row, dense),
            ]


def _compiled(step: ResultRow) -> str:
    return ", torch.compile" if step.get("compiled") else ""


def _describe(problem: ProblemRows) -> str:
    row = problem.first
    return (
        f"{problem.name}: {row['n']:,} tokens, {row['heads']} heads of {row['head_dim']}, "
        f"{row['dtype']}"
    )


def _table(headings: list[str], rows: Iterable[list[Any]]) -> list[str]:
    lines = [headings, ["---"] * len(headings), *rows]
    return ["| " + " | ".join(str(cell) for cell in line) + " |" for line in lines]


def estimate_of(row: ResultRow) -> str:
    """The stride, and the precision of scoring where it is not exact."""
    precision = row.get("precision", "exact")
    return str(row["stride"]) if precision == "exact" else f"{row['stride']} ({precision})"


def _ms(row: ResultRow | None) -> str:
    if row is None:
        return ""
    found = row["latency_ms"]
    return f"{found:.0f}" if found >= 1000 else f"{found:.3g}"


def _gib(row: ResultRow) -> str:
    found = row["extra_memory_gib"]
    return "" if found is None else f"{found:.2f}"


def _times(speedup: float | None) -> str:
    return "" if speedup is None else f"{speedup:.2f}x"


def _over(row: ResultRow, other: ResultRow | None) -> str:
    if other is None or other is row:
        return ""
    return _times(other["latency_ms"] / row["latency_ms"])
