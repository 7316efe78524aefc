"""Tables of whole steps, for the pages on refreshes and on several GPUs."""

from pathlib import Path
from typing import Any

from benchmarks.results_files import RESULTS, ResultFile, read_results
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
    """Steps that refresh, steps that add residuals, and plain ones beside them."""
    steps = [file for file in files if "gpu" in file.content]
    rows = [row | {"file": file} for file in steps for row in file.content["rows"]]
    # Every fifth or tenth step refreshes; the others add.
    for file in steps:
        for row in file.content["rows"]:
            if row["phase"] == "residual":
                (refresh,) = (
                    one["latency_ms"]
                    for one in file.content["rows"]
                    if one["phase"] == "refresh" and one["asked_density"] == row["asked_density"]
                )
                means = [(refresh + (r - 1) * row["latency_ms"]) / r for r in (5, 10)]
                rows += [
                    row | {"file": file, "phase": f"mean, every {r}", "latency_ms": mean}
                    for r, mean in zip((5, 10), means, strict=True)
                ]
    columns = {
        "residual kept on": lambda row: row.get("residual"),
        "density": lambda row: _number(row["density"], ".3f"),
        "step": lambda row: row["phase"],
        "seconds": lambda row: f"{row['latency_ms'] / 1e3:.2f}",
        "peak GiB": lambda row: f"{row['peak_memory_gib']:.1f}",
    }
    return _section(steps, Table.of(rows, columns, num_left=3))


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
