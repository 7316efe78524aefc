"""Reads the files of `benchmarks/results` and finds the rows that belong together."""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xattn_video.measure.dense_baselines import best_dense
from xattn_video.reporting.tables import Table

ResultRow = dict[str, Any]

RESULTS = Path(__file__).parent / "results"
AUTHORS = "x-attention"
# A problem that is one of several sizes of a sweep.
_SWEEP = re.compile(r"(cpu-)?\d+k")


def describe_video(row: ResultRow) -> str:
    """Height, width and number of frames."""
    return f"{row['height']}x{row['width']}, {row['num_frames']} frames"


@dataclass(frozen=True, slots=True)
class ProblemRows:
    """The rows of one attention problem in one result file."""

    name: str
    rows: tuple[ResultRow, ...]

    @property
    def first(self) -> ResultRow:
        """A row that has the problem's sizes."""
        return self.rows[0]

    @property
    def from_model(self) -> bool:
        """Whether a model computed the inputs."""
        return bool(self.first["inputs"] == "model")

    def select(self, name: str, **columns: object) -> list[ResultRow]:
        """The rows called ``name`` with these values."""
        return [
            row
            for row in self.rows
            if row["name"] == name and all(row.get(key) == columns[key] for key in columns)
        ]

    def find(self, name: str, **columns: object) -> ResultRow | None:
        """The first of these rows, or None."""
        return next(iter(self.select(name, **columns)), None)

    def part(self, name: str, total: ResultRow, **columns: object) -> ResultRow | None:
        """The row of a part of a total; None if it was not timed."""
        same = {key: total.get(key) for key in ("stride", "precision", "threshold")}
        return self.find(name, **same, **columns)

    def scoring_of(self, total: ResultRow) -> ResultRow | None:
        """The scoring row of a total; that of the authors' code includes selection."""
        if total["backend"] == AUTHORS:
            return self.part("scoring", total, backend=AUTHORS)
        same = {key: total.get(key) for key in ("stride", "precision")}
        return self.find("scoring", backend=None, **same)

    @property
    def best_dense(self) -> ResultRow | None:
        """The fastest dense kernel of the run that uses no mask."""
        return best_dense(self.rows)

    @property
    def heads(self) -> str:
        """Number, size and dtype of the heads."""
        return f"{self.first['heads']} heads of {self.first['head_dim']}, {self.first['dtype']}"


@dataclass(frozen=True, slots=True)
class ResultFile:
    """One result file: one run on one machine."""

    stem: str
    content: dict[str, Any]

    @property
    def device(self) -> str:
        """The name of the GPU or the CPU."""
        if self.on_gpu:
            return str(self.content["gpu"])
        threads = self.content["threads"]
        return f"CPU ({self.content['cpu']}, {threads} thread{'s' * (threads > 1)})"

    @property
    def packages(self) -> str:
        """The package versions of the run."""
        versions = self.content["versions"].items()
        return ", ".join(f"{k} {v}" for k, v in versions if v and k != "xattn-video")

    @property
    def place(self) -> str:
        """The device, the package versions and the command of the run."""
        return f"{self.device}: {self.packages}; `{self.content['command']}`"

    @property
    def kind(self) -> str:
        """The name of the first row, and of all rows if the file has only one kind."""
        return self.content["rows"][0]["name"]

    @property
    def on_gpu(self) -> bool:
        return self.content["gpu"] is not None

    @property
    def problems(self) -> list[ProblemRows]:
        """The problems in the order of the run."""
        rows: dict[str, list[ResultRow]] = {}
        for row in self.content["rows"]:
            if row["name"] != "step":
                rows.setdefault(row["problem"], []).append(row)
        return [ProblemRows(name, tuple(found)) for name, found in rows.items()]

    @property
    def steps(self) -> list[ResultRow]:
        """Whole denoising steps on one GPU."""
        rows = self.content["rows"]
        return [row for row in rows if row["name"] == "step" and row.get("gpus", 1) == 1]

    @property
    def single_problems(self) -> list[ProblemRows]:
        """Problems on random inputs that are not part of a sweep."""
        sweep = {problem.name for problem in self.sweep}
        return [p for p in self.problems if p.name not in sweep and not p.from_model]

    @property
    def sweep(self) -> list[ProblemRows]:
        """The problems of the sweep, by size; empty if there is only one size."""
        found = [problem for problem in self.problems if _SWEEP.fullmatch(problem.name)]
        return sorted(found, key=lambda p: int(p.first["n"])) if len(found) > 1 else []

    @property
    def model_problems(self) -> list[ProblemRows]:
        """Problems on a model's own queries and keys."""
        return [problem for problem in self.problems if problem.from_model]


def read_json(path: Path) -> Any:
    """The content of a JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))


def read_reports(folder: Path, names: str = "*.json") -> dict[str, dict[str, Any]]:
    """{name without suffix: content} of the JSON files of a folder, by name."""
    found = {path.stem: read_json(path) for path in folder.glob(names)}
    return dict(sorted(found.items()))


def sourced(table: Table, files: Iterable[ResultFile]) -> str:
    """A table in Markdown, and a line about the run of each file."""
    lines = [table.markdown(), ""]
    for file in files:
        run = f"{file.device}, {file.content['date']}, {file.packages}"
        lines.append(f"- {run}: `{file.content['command']}`")
    return "\n".join(lines) + "\n"


def rows_of(files: Iterable[ResultFile]) -> list[ResultRow]:
    """The rows of several files, one after the other."""
    return [row for file in files for row in file.content["rows"]]


def read_results(folder: Path = RESULTS) -> list[ResultFile]:
    """All files of a folder, GPUs first, then by name."""
    found = [ResultFile(*report) for report in read_reports(folder).items()]
    return sorted(found, key=lambda file: not file.on_gpu)
