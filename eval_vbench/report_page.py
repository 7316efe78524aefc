"""A report as Markdown and as plain values."""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from eval_vbench.dimensions import DATA, Totals, dimensions
from eval_vbench.prompts import DEMO_SUITE
from eval_vbench.run_comparison import (
    CompleteRun,
    Measures,
    SparseResult,
    caveats,
    devices,
    measures_of,
    shares_right,
)
from eval_vbench.statistics import Difference
from xattn_video.measure.comparison_page import markdown_table
from xattn_video.measure.comparison_rows import format_cell

_NOT_MEASURED = "-"


def report_values(dense: CompleteRun, results: Sequence[SparseResult]) -> dict[str, Any]:
    """Everything, ready for JSON."""
    return {
        "caveats": caveats(dense, results),
        "settings": {**dense.settings, "sparse": None},
        "dense": {
            "run": str(dense.folder.path),
            "measures": asdict(measures_of(dense)),
            "checks": shares_right(dense),
        },
        "sparse": [
            {
                "run": str(result.run.folder.path),
                "label": result.run.label,
                "settings": result.run.settings["sparse"],
                "dimensions": [asdict(row) for row in result.dimensions],
                "totals": None if result.totals is None else _totals_values(result.totals),
                "measures": asdict(result.measures),
                "checks": result.checks,
            }
            for result in results
        ],
    }


def report_page(dense: CompleteRun, results: Sequence[SparseResult], notes: Sequence[str]) -> str:
    """The report as Markdown.

    Args:
        dense: The reference.
        results: What is beside it.
        notes: What could not be measured.
    """
    video = dense.settings["video"]
    parts = [
        "# Dense against sparse",
        f"{dense.settings['model']}, {video['width']}x{video['height']}, {video['num_frames']} "
        f"frames at {dense.settings['fps']} fps, {video['num_inference_steps']} steps, suite "
        f"{dense.settings['suite']}, {len(dense.items)} videos a run. {_origin(dense, results)}",
        "\n".join(f"- **{text}**" for text in caveats(dense, results)),
        "\n".join(f"- {text}" for text in notes),
        "## Fidelity and cost",
        _measures_table(dense, results),
    ]
    if any(result.checks for result in results):
        parts += ["## Prompts still followed", _checks_table(dense, results)]
    for result in results:
        parts += [f"## VBench: {result.run.label}", _dimension_table(result)]
    if dense.settings["suite"] != DEMO_SUITE:
        parts += ["## The paper's figures", _paper_table(results)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _origin(dense: CompleteRun, results: Sequence[SparseResult]) -> str:
    """The devices and versions that made the videos."""
    runs = [dense, *(result.run for result in results)]
    names = sorted(set.union(*map(devices, runs)))
    versions = {
        f"{name} {version}"
        for run in runs
        for record in run.records.values()
        for name, version in record["versions"].items()
    }
    return f"Device: {', '.join(names)}; {', '.join(sorted(versions))}."


def _measures_table(dense: CompleteRun, results: Sequence[SparseResult]) -> str:
    rows = [(dense.label, measures_of(dense))]
    rows += [(result.run.label, result.measures) for result in results]
    columns: dict[str, Callable[[Measures], str]] = {
        "videos": lambda m: str(m.videos),
        "PSNR dB": lambda m: format_cell(m.psnr, ".2f"),
        "SSIM": lambda m: format_cell(m.ssim, ".4f"),
        "LPIPS": lambda m: format_cell(m.lpips, ".4f"),
        "VMAF": lambda m: format_cell(m.relative_vmaf, ".1f", "%"),
        "density": lambda m: format_cell(m.density, ".1%"),
        "s/video": lambda m: format_cell(m.seconds, ".1f"),
        "speed-up": lambda m: format_cell(m.speedup, ".2f", "x"),
        "step speed-up": lambda m: format_cell(m.step_speedup, ".2f", "x"),
        "GiB": lambda m: format_cell(m.peak_memory_gib, ".2f"),
    }
    cells = [[label, *(cell(row) for cell in columns.values())] for label, row in rows]
    return markdown_table(["run", *columns], cells)


def _checks_table(dense: CompleteRun, results: Sequence[SparseResult]) -> str:
    """Shares of the demo model's own checks, measured from the pixels."""
    rows = [(dense.label, shares_right(dense))]
    rows += [(result.run.label, result.checks) for result in results]
    names = list(rows[0][1])
    cells = [
        [label, *(format_cell(shares.get(name), ".1%") for name in names)]
        for label, shares in rows
    ]
    return markdown_table(["run", *names], cells)


def _dimension_table(result: SparseResult) -> str:
    """A row for each dimension that both runs were scored on; the others are named."""
    cells = [
        [
            row.dimension,
            str(row.difference.pairs if row.difference else 0),
            f"{row.dense:.4f}",
            f"{row.sparse:.4f}",
            _NOT_MEASURED if row.difference is None else f"{row.difference.mean:+.4f}",
            _interval(row.difference),
        ]
        for row in result.dimensions
    ]
    if result.totals is not None:
        pairs = zip(*(asdict(totals).items() for totals in result.totals), strict=True)
        for (name, dense), (_, sparse) in pairs:
            label = f"**{name.capitalize()}**"
            cells.append(
                [label, "", f"{dense:.4f}", f"{sparse:.4f}", f"{sparse - dense:+.4f}", ""]
            )
    table = markdown_table(["dimension", "n", "dense", "sparse", "delta", "95% interval"], cells)
    missing = sorted(set(dimensions()) - {row.dimension for row in result.dimensions})
    if not missing:
        return table
    remark = (
        f"{len(missing)} of {len(dimensions())} dimensions were not scored for both runs, so "
        f"there is no Quality, Semantic or Total: {', '.join(missing)}."
    )
    return f"{table}\n\n{remark}" if cells else remark


def _paper_table(results: Sequence[SparseResult]) -> str:
    """The paper's figures beside those of runs at its settings."""
    paper = json.loads((DATA / "paper.json").read_text(encoding="utf-8"))
    formats = {"psnr": ".1f", "ssim": ".3f", "lpips": ".3f", "density": ".1%"}
    cells = []
    for row in paper["rows"]:
        run = next((r for r in results if _is_papers(r.run, paper, row["threshold"])), None)
        measured = {} if run is None else asdict(run.measures)
        line = [f"{row['threshold']:.2f}"]
        for name, form in formats.items():
            line += [f"{row[name]:{form}}", format_cell(measured.get(name), form) or _NOT_MEASURED]
        cells.append(line)
    headings = ["tau"]
    for name in ("PSNR", "SSIM", "LPIPS", "density"):
        headings += [f"{name}, paper", "here"]
    table = markdown_table(headings, cells)
    return (
        f"{table}\n\nPaper: {paper['source']}. `{_NOT_MEASURED}`: not measured at the paper's "
        "settings (data/paper.json)."
    )


def _is_papers(run: CompleteRun, paper: dict[str, Any], threshold: float) -> bool:
    """Whether a run has the paper's settings."""
    sparse = run.settings["sparse"] or {}
    found = {**run.settings["video"], **run.settings, **sparse}
    found["flow_shift"] = next(iter(run.records.values()))["flow_shift"]
    wanted = {**paper["settings"], "threshold": threshold}
    return all(found.get(name) == value for name, value in wanted.items())


def _totals_values(both: tuple[Totals, Totals]) -> dict[str, Any]:
    return {"dense": asdict(both[0]), "sparse": asdict(both[1])}


def _interval(difference: Difference | None) -> str:
    if difference is None or difference.low is None or difference.high is None:
        return _NOT_MEASURED
    return f"[{difference.low:+.4f}, {difference.high:+.4f}]"
