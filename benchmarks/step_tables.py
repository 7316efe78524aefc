"""Tables of whole steps, for the pages on refreshes and on several GPUs."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.results_files import RESULTS, ResultFile, ResultRow, read_results
from xattn_video.reporting.pages import replace_between
from xattn_video.reporting.tables import Table

BEGIN, END = "<!-- steps: begin, written by benchmarks.write_page -->\n", "<!-- steps: end -->"


def render_step_pages(docs: Path) -> dict[Path, str]:
    """The pages of a folder that show such tables, with the tables of today."""
    sections = {
        "fewer-blocks.md": _refreshes(read_results(RESULTS / "fewer_blocks")),
        "multi_gpu.md": _several_gpus(read_results(RESULTS / "multi_gpu")),
    }
    pages = {docs / name: section for name, section in sections.items() if (docs / name).exists()}
    return {
        path: replace_between(path.read_text(encoding="utf-8"), BEGIN, END, section)
        for path, section in pages.items()
    }


def _refreshes(files: list[ResultFile]) -> str:
    """Plain steps, steps that refresh or add residuals, and the mean of those two."""
    rows = [row for file in files for row in file.content["rows"]]
    means = [mean for file in files for mean in _mean_steps(file.content["rows"])]
    columns = {
        "residual kept on": lambda row: row.get("residual"),
        "density": lambda row: _number(row["density"], ".3f"),
        "step": lambda row: row["phase"],
        "seconds": lambda row: f"{row['latency_ms'] / 1e3:.2f}",
        "peak GiB": lambda row: f"{row['peak_memory_gib']:.1f}",
    }
    return _section(files, Table.of(rows + means, columns, num_left=3))


def _mean_steps(rows: list[ResultRow]) -> Iterator[ResultRow]:
    """A row for each density and distance of refreshes: one step refreshes, the others add."""
    refreshes = {
        row["asked_density"]: row["latency_ms"] for row in rows if row["phase"] == "refresh"
    }
    for row in rows:
        if row["phase"] == "residual":
            for every in (5, 10):
                total_ms = refreshes[row["asked_density"]] + (every - 1) * row["latency_ms"]
                yield row | {"phase": f"mean, every {every}", "latency_ms": total_ms / every}


def _several_gpus(files: list[ResultFile]) -> str:
    """Each kind of step on one GPU and on several."""
    pairs = [
        (one, many)
        for file in files
        for many in file.content["rows"]
        if many["gpus"] > 1
        for one in file.content["rows"]
        if one["gpus"] == 1 and one["phase"] == many["phase"]
    ]
    columns = {
        "step": lambda pair: pair[1]["phase"],
        "density": lambda pair: _number(pair[1]["density"], ".3f"),
        "GPUs": lambda pair: pair[1]["gpus"],
        "one GPU s": lambda pair: f"{pair[0]['latency_ms'] / 1e3:.2f}",
        "seconds": lambda pair: f"{pair[1]['latency_ms'] / 1e3:.2f}",
        "faster": lambda pair: f"{pair[0]['latency_ms'] / pair[1]['latency_ms']:.2f}x",
        "exchanges": lambda pair: f"{pair[1]['exchange_ms'] / pair[1]['latency_ms']:.1%}",
        "peak GiB of one": lambda pair: f"{pair[0]['peak_memory_gib']:.1f}",
        "peak GiB a GPU": lambda pair: f"{pair[1]['peak_memory_gib']:.1f}",
        "difference": lambda pair: f"{pair[1]['difference']:.1e}",
    }
    return _section(files, Table.of(pairs, columns))


def _section(files: list[ResultFile], table: Table) -> str:
    """The table and where it comes from."""
    lines = [table.markdown(), ""]
    for file in files:
        content: dict[str, Any] = file.content
        versions = ", ".join(f"{k} {v}" for k, v in content["versions"].items() if v)
        lines.append(f"- {content['gpu']}, {content['date']}, {versions}: `{content['command']}`")
    return "\n".join(lines) + "\n"


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)
