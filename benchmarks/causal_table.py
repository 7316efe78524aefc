"""The tables of causal attention and of decoding on docs/long_context.md."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from benchmarks.results_files import RESULTS, ProblemRows, ResultFile, ResultRow, read_results
from xattn_video.reporting.tables import Table

# Speed-up over FlashInfer at stride 16 (arXiv:2503.16428, figure 4) and density (table 5).
_PAPER = {
    8: (1.5, 0.4355),
    16: (2.5, 0.2891),
    32: (5.1, 0.2793),
    64: (8.4, 0.1132),
    128: (11.7, 0.0732),
    256: (13.5, None),
}


@dataclass(frozen=True, slots=True)
class _Length:
    """XAttention with one density at one length, with every backend."""

    problem: ProblemRows
    rows: tuple[ResultRow, ...]

    @property
    def default(self) -> ResultRow:
        """The row of the backend that `auto` chooses, which the benchmark lists first."""
        return self.rows[0]

    @property
    def dense(self) -> ResultRow:
        best = self.problem.best_dense
        assert best is not None, self.problem.name
        return best

    def part_ms(self, part: str) -> str:
        """Milliseconds of scoring, selection or attention by itself."""
        columns = {"backend": self.default["backend"]} if part == "attention" else {}
        row = self.problem.part(part, self.default, **columns)
        if part == "scoring":
            row = self.problem.scoring_of(self.default)
        return "" if row is None else _ms(row)

    def faster(self, row: ResultRow) -> str:
        """The speed-up of a row over the best dense kernel."""
        return f"{self.dense['latency_ms'] / row['latency_ms']:.2f}x"


def render() -> str:
    """Tables of attention by itself, by length and density, and of decoding, with sources."""
    sections: list[str] = []
    for file in read_results(RESULTS / "causal"):
        sections.extend(_decoding(file) if file.kind == "decode" else _attention(file))
    return "\n".join(sections) or "No run of either is committed yet.\n"


def attention_alone(tokens: int) -> str:
    """The speed-up of attention over the best dense kernel at one length; "" if unknown."""
    lengths = (
        length
        for file in read_results(RESULTS / "causal")
        if file.kind != "decode"
        for length in _lengths(file)
    )
    found = next((one for one in lengths if one.default["n"] == tokens), None)
    if found is None:
        return ""
    return (
        f"; attention alone {found.faster(found.default)} as fast as {found.dense['backend']} "
        f"({_ms(found.default)} instead of {_ms(found.dense)} ms)"
    )


def _attention(file: ResultFile) -> Iterator[str]:
    lengths = [*_lengths(file)]
    densities = sorted({length.default["wanted_density"] for length in lengths})
    for density in densities:
        some = [one for one in lengths if one.default["wanted_density"] == density]
        columns: dict[str, Any] = {
            "tokens": lambda one: f"{one.default['n']:,}",
            "density": lambda one: f"{one.default['density']:.3f}",
            "best dense": lambda one: f"{one.dense['backend']}, {_ms(one.dense)}",
            "scoring": lambda one: one.part_ms("scoring"),
            "selection": lambda one: one.part_ms("selection"),
            "attention": lambda one: one.part_ms("attention"),
            "total": lambda one: _ms(one.default),
            "faster": lambda one: one.faster(one.default),
        }
        for place, row in enumerate(some[0].rows[1:], 1):
            columns[f"with `{row['backend']}`"] = lambda one, p=place: one.faster(one.rows[p])
        if density == densities[0]:
            columns["paper (density)"] = lambda one: _paper(one.default["n"])
        yield Table.of(some, columns).markdown() + "\n"
    first = lengths[0].default
    yield (
        f"- {first['heads']} query heads on {first['key_heads']} key heads of "
        f"{first['head_dim']}, {first['dtype']}, stride {first['stride']}, backend "
        f"`{first['backend']}` unless named; milliseconds; {file.place}\n"
    )


def _lengths(file: ResultFile) -> Iterator[_Length]:
    """The lengths of a file, the shortest first, each with all densities."""
    for problem in sorted(file.problems, key=lambda problem: int(problem.first["n"])):
        rows = sorted(problem.select("xattention"), key=lambda row: float(row["wanted_density"]))
        for _, alike in groupby(rows, key=lambda row: row["wanted_density"]):
            yield _Length(problem, tuple(alike))


def _decoding(file: ResultFile) -> Iterator[str]:
    columns = {
        "decoding": lambda row: row["model"],
        "own attention, a token": lambda row: f"{row['sdpa_ms']:.2f} ms",
        "xattention": lambda row: f"{row['xattention_ms']:.2f} ms",
        "median ratio of neighbours": lambda row: f"{row['ratio']:.3f}",
    }
    rows = file.content["rows"]
    yield Table.of(rows, columns).markdown() + "\n"
    yield (
        f"- {rows[0]['rounds']} rounds of {rows[0]['steps']} tokens each in turns, after "
        f"{rows[0]['tokens']:,} tokens, {rows[0]['dtype']}; the times are medians; {file.place}\n"
    )


def _ms(row: ResultRow) -> str:
    return f"{row['latency_ms']:.3g}"


def _paper(tokens: int) -> str:
    speedup, density = _PAPER.get(tokens // 1024, (None, None))
    if speedup is None:
        return ""
    return f"{speedup}x" if density is None else f"{speedup}x ({density:.2f})"
