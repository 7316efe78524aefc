"""The table of RULER on docs/long_context.md, from reports of `eval_language.ruler`."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import mean
from typing import Any

from benchmarks.results_files import RESULTS, read_json, read_reports
from xattn_video.measure.paired_scores import PairedScores, Record
from xattn_video.reporting.machine import describe_versions
from xattn_video.reporting.tables import Table, figure

RULER = RESULTS / "ruler"
_PAPER = RESULTS.parents[1] / "eval_language/data/paper_tables.json"
_PAPERS_MODEL = "Llama-3.1-8B-Instruct"
# If dense attention scores less on a task, the task says little about sparse attention.
_SOLVED = 0.9
_LAYERS = re.compile(r"(\d+)/(\d+) layers sparse")


@dataclass(frozen=True)
class RulerRuns:
    """Reports of one model with the same settings, such as one for each length.

    Raises:
        ValueError: Model, dtype or number of samples differ, two reports have the same result, or
            a result is missing.
    """

    reports: tuple[dict[str, Any], ...]

    def __post_init__(self) -> None:
        if len({(one["model"], one["dtype"], one["samples"]) for one in self.reports}) > 1:
            raise ValueError("the reports of RULER must be of one model, dtype and --samples.")
        if sum(len(one["results"]) for one in self.reports) > len(self._records):
            raise ValueError("two reports of RULER hold the same result; keep one of them.")
        if len(self._records) < len(self.tasks) * len(self.lengths) * len(self.settings):
            raise ValueError("the reports of RULER must have the same tasks and settings.")

    @classmethod
    def read(cls) -> "RulerRuns | None":
        """All committed reports; None if there are none."""
        reports = tuple(read_reports(RULER).values())
        return cls(reports) if reports else None

    @cached_property
    def _records(self) -> dict[tuple[str, int, str], Record]:
        """{(task, length, setting): its result}."""
        found = {}
        for result in (result for report in self.reports for result in report["results"]):
            task, _, length = result["task"].rpartition(", ")
            found[task, int(length), result["setting"]] = result
        return found

    @property
    def tasks(self) -> list[str]:
        """The tasks in the order of the run."""
        return [*dict.fromkeys(task for task, _, _ in self._records)]

    @property
    def lengths(self) -> list[int]:
        """The lengths, the shortest first."""
        return sorted({length for _, length, _ in self._records})

    @property
    def settings(self) -> list[str]:
        """The settings, dense attention first."""
        return [*dict.fromkeys(setting for _, _, setting in self._records)]

    @property
    def solved(self) -> list[str]:
        """The tasks that dense attention solves at every length."""
        return [
            task
            for task in self.tasks
            if all(
                self.scores([task], length, self.settings[0]).score >= _SOLVED
                for length in self.lengths
            )
        ]

    def scores(self, tasks: Sequence[str], length: int, setting: str) -> PairedScores:
        """The scores of some tasks together."""
        dense, of = (
            [self._records[task, length, label] for task in tasks]
            for label in (self.settings[0], setting)
        )
        return PairedScores.of(dense, dense if setting == self.settings[0] else of)

    def share_of_all(self, tasks: Sequence[str], length: int, setting: str) -> float | None:
        """Share of the blocks of all layers, dense ones included; None for dense attention."""
        shares = [
            share_of_all(one["density"], *map(int, _LAYERS.findall(one["attention"])[0]))
            for one in (self._records[task, length, setting] for task in tasks)
            if one["density"] is not None
        ]
        return mean(shares) if shares else None

    def places(self) -> list[str]:
        """The machines and versions of the runs."""
        found = self._records.values()
        return sorted({f"{one['device']}: {describe_versions(one['versions'])}" for one in found})


def share_of_all(density: float, sparse_layers: int, layers: int) -> float:
    """Share of the blocks of all layers, from the density of the sparse ones."""
    return density * (sparse_layers / layers) + (layers - sparse_layers) / layers


def render() -> str:
    """The table, with a row for each task and setting and the paper's rows, and a summary."""
    runs = RulerRuns.read()
    if runs is None:
        return "No run is committed yet.\n"
    solved, unsolved = runs.solved, [task for task in runs.tasks if task not in runs.solved]
    groups = [("all solved", solved)] * bool(solved) + [(task, [task]) for task in runs.tasks]
    rows: list[tuple[str, ...]] = []
    for name, tasks in groups:
        rows += [(name, setting, *_cells(runs, tasks, setting)) for setting in runs.settings]
        rows += _paper_rows(runs.lengths) if name == "all solved" else []
    headings = [
        text
        for n in runs.lengths
        for text in (f"{n:,}: score, difference to dense", "density of sparse layers, of all")
    ]
    table = Table(("task", "setting", *headings), tuple(rows), num_left=2)
    first, lengths = runs.reports[0], ",".join(map(str, runs.lengths))
    facts = [
        f"{first['model']}, {first['dtype']}, {first['samples']} samples of each task at each "
        "length; in brackets the 95% interval of the paired difference",
        f"solved, which is {_SOLVED} or more with dense attention at every length: "
        f"{', '.join(solved) or 'none'}; not solved: {', '.join(unsolved) or 'none'}",
        "density: the share of the blocks of the sparse layers, then of those of all layers, "
        "dense ones included",
        f"the paper's rows are {_PAPERS_MODEL}'s on its own tasks, with a threshold for each head "
        "and the density as printed there",
        f"the command: `scripts/run_ruler.sh --run runs/ruler --model {first['model']} --lengths "
        f"{lengths} --samples {first['samples']} --tasks {','.join(runs.tasks)} --settings "
        f"{','.join(map(_as_option, runs.settings[1:]))}`",
        *runs.places(),
    ]
    return "\n".join([table.markdown(), "", *(f"- {fact}" for fact in facts)]) + "\n"


def _as_option(setting: str) -> str:
    """A sparse setting as `--settings` takes it, such as 0.9:8:2: the numbers in its name."""
    return ":".join(re.findall(r"\d[\d.]*", setting))


def _cells(runs: RulerRuns, tasks: Sequence[str], setting: str) -> Iterator[str]:
    for length in runs.lengths:
        found = runs.scores(tasks, length, setting)
        yield _score(found)
        share = runs.share_of_all(tasks, length, setting)
        yield "" if share is None else f"{found.density:.3f}, {share:.3f}"


def _score(found: PairedScores) -> str:
    if found.difference is None:
        return f"{found.score:.3f}"
    return f"{found.score:.3f}, {found.difference.mean:+.3f} {found.difference.interval}"


def _paper_rows(lengths: Sequence[int]) -> Iterator[tuple[str, ...]]:
    """The paper's rows of full attention and XAttention at the same lengths."""
    paper = read_json(_PAPER)["RULER"]
    full, *others = paper["rows"]
    for row in [full, *(row for row in others if row[0] in paper["densities"])]:
        cells: list[str] = []
        for length in lengths:
            name = f"{length / 1024:g}k"
            if name not in paper["columns"]:
                cells += ["", ""]
                continue
            at = paper["columns"].index(name)
            change = f", {(row[at] - full[at]) / 100:+.3f}"
            cells.append(f"{row[at] / 100:.3f}" + change * (row is not full))
            density = None if row is full else paper["densities"][row[0]][at - 1] / 100
            cells.append(figure(density, ".3f"))
        yield ("the paper's, of another model", row[0], *cells)
