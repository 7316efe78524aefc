"""The report as Markdown and as plain values."""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from eval_vbench.dimensions import DATA, dimensions
from eval_vbench.prompts import DEMO_SUITE
from eval_vbench.run_comparison import (
    CompleteRun,
    DimensionRow,
    Measures,
    SparseResult,
    caveats,
    devices,
    measures_of,
    shares_right,
)
from xattn_video.reporting.pages import render
from xattn_video.reporting.tables import Table, figure

_TEMPLATE = Path(__file__).with_name("report.md.jinja")
_NOT_MEASURED = "-"


def report_values(dense: CompleteRun, results: Sequence[SparseResult]) -> dict[str, Any]:
    """The whole report as plain values, ready for JSON."""
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
                "totals": result.totals
                and dict(zip(("dense", "sparse"), map(asdict, result.totals), strict=True)),
                "measures": asdict(result.measures),
                "checks": result.checks,
            }
            for result in results
        ],
    }


def report_page(
    dense: CompleteRun, results: Sequence[SparseResult], notes: Sequence[str], plot: str = ""
) -> str:
    """The report as Markdown.

    Args:
        dense: The dense run, which is the reference.
        results: The results of the sparse runs.
        notes: What could not be measured.
        plot: Name of the plot, if there is one.
    """
    tables = ReportTables(dense, results)
    return render(
        _TEMPLATE,
        settings=dense.settings,
        num_videos=len(dense.items),
        origin=tables.origin,
        caveats=caveats(dense, results),
        notes=notes,
        measures=tables.measures,
        checks=tables.checks,
        results=[(result.run.label, tables.dimensions_text(result)) for result in results],
        paper=tables.paper,
        not_measured=_NOT_MEASURED,
        plot=plot,
    )


@dataclass(frozen=True, slots=True)
class ReportTables:
    """The tables of a report, for all its formats."""

    dense: CompleteRun
    results: Sequence[SparseResult]

    @property
    def origin(self) -> str:
        """The devices and versions that made the videos."""
        return _origin(self.dense, self.results)

    @property
    def measures(self) -> Table:
        """Fidelity and cost of every run."""
        rows = [(self.dense.label, measures_of(self.dense))]
        rows += [(result.run.label, result.measures) for result in self.results]
        return Table.of(rows, _MEASURES)

    @property
    def checks(self) -> Table | None:
        """The demo model's own checks; None for another model."""
        checks = [(self.dense.label, shares_right(self.dense))]
        checks += [(result.run.label, result.checks) for result in self.results]
        return _checks_table(checks) if any(shares for _, shares in checks[1:]) else None

    @property
    def paper(self) -> tuple[Table, str] | None:
        """The paper's figures and their source; None for another suite."""
        return None if self.dense.settings["suite"] == DEMO_SUITE else _paper_table(self.results)

    def dimensions(self, result: SparseResult, mark: str = "") -> tuple[Table, str]:
        """One row for each dimension that both runs were scored on, and what was not scored.

        Args:
            result: The result of one sparse run.
            mark: Text on both sides of the totals' names.
        """
        table = Table.of(result.dimensions, _DIMENSIONS)
        if result.totals is not None:
            pairs = zip(*(asdict(totals).items() for totals in result.totals), strict=True)
            rows = tuple(
                (
                    f"{mark}{name.capitalize()}{mark}",
                    "",
                    f"{a:.4f}",
                    f"{b:.4f}",
                    f"{b - a:+.4f}",
                    "",
                )
                for (name, a), (_, b) in pairs
            )
            table = replace(table, rows=table.rows + rows)
        missing = sorted(set(dimensions()) - {row.dimension for row in result.dimensions})
        remark = (
            f"{len(missing)} of {len(dimensions())} dimensions were not scored for both runs, so "
            f"there is no Quality, Semantic or Total: {', '.join(missing)}."
        )
        return table, remark if missing else ""

    def dimensions_text(self, result: SparseResult) -> str:
        """The table and the text of `dimensions` as Markdown."""
        table, remark = self.dimensions(result, mark="**")
        return "\n\n".join([table.markdown()] * bool(table.rows) + [remark] * bool(remark))


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


def _checks_table(checks: Sequence[tuple[str, dict[str, float]]]) -> Table:
    """The shares of the demo model's own checks that are right, measured from the pixels."""
    names = list(checks[0][1])
    rows = [(run, *(figure(shares.get(name), ".1%") for name in names)) for run, shares in checks]
    return Table(("run", *names), tuple(rows))


def _paper_table(results: Sequence[SparseResult]) -> tuple[Table, str]:
    """The paper's figures beside those of runs with its settings, and their source."""
    paper = json.loads((DATA / "paper.json").read_text(encoding="utf-8"))
    formats = {"PSNR": ".1f", "SSIM": ".3f", "LPIPS": ".3f", "density": ".1%"}
    rows = []
    for row in paper["rows"]:
        run = next((r for r in results if _is_papers(r.run, paper, row["threshold"])), None)
        cells = [f"{row['threshold']:.2f}"]
        for name, form in formats.items():
            measured = None if run is None else getattr(run.measures, name.lower())
            cells += [f"{row[name.lower()]:{form}}", figure(measured, form) or _NOT_MEASURED]
        rows.append(tuple(cells))
    headings = [heading for name in formats for heading in (f"{name}, paper", "here")]
    return Table(("tau", *headings), tuple(rows)), paper["source"]


def _is_papers(run: CompleteRun, paper: dict[str, Any], threshold: float) -> bool:
    """Whether a run has the paper's settings."""
    sparse = run.settings["sparse"] or {}
    found = {**run.settings["video"], **run.settings, **sparse}
    found["flow_shift"] = next(iter(run.records.values()))["flow_shift"]
    wanted = {**paper["settings"], "threshold": threshold}
    return all(found.get(name) == value for name, value in wanted.items())


_MEASURES: dict[str, Callable[[tuple[str, Measures]], str]] = {
    "run": lambda row: row[0],
    "videos": lambda row: str(row[1].videos),
    "PSNR dB": lambda row: figure(row[1].psnr, ".2f"),
    "SSIM": lambda row: figure(row[1].ssim, ".4f"),
    "LPIPS": lambda row: figure(row[1].lpips, ".4f"),
    "VMAF": lambda row: figure(row[1].relative_vmaf, ".1f", "%"),
    "density": lambda row: figure(row[1].density, ".1%"),
    "s/video": lambda row: figure(row[1].seconds, ".1f"),
    "speed-up": lambda row: figure(row[1].speedup, ".2f", "x"),
    "step speed-up": lambda row: figure(row[1].step_speedup, ".2f", "x"),
    "GiB": lambda row: figure(row[1].peak_memory_gib, ".2f"),
}
_DIMENSIONS: dict[str, Callable[[DimensionRow], str]] = {
    "dimension": lambda row: row.dimension,
    "n": lambda row: str(row.difference.pairs if row.difference else 0),
    "dense": lambda row: f"{row.dense:.4f}",
    "sparse": lambda row: f"{row.sparse:.4f}",
    "delta": lambda row: f"{row.difference.mean:+.4f}" if row.difference else _NOT_MEASURED,
    "95% interval": lambda row: row.difference.interval if row.difference else _NOT_MEASURED,
}
