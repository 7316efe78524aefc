"""Tables of the cost of compensation and token order, for docs/fewer-blocks.md."""

from collections.abc import Iterator

from benchmarks.results_files import RESULTS, ResultFile, read_results
from xattn_video.pipelines.model_shape import ModelShape
from xattn_video.reporting.tables import Table

_UNMEASURED = "`python -m benchmarks.skipped_blocks` measures each part on your GPU.\n"
# The parts of a sparse layer without compensation.
_LAYER = ("scoring", "selection", "attention")


def render(files: list[ResultFile] | None = None) -> str:
    """The table of each part of a sparse layer, and the total cost of compensation and order."""
    files = read_results(RESULTS / "skipped_blocks") if files is None else files
    return "\n".join(part for file in files for part in _sections(file)) or _UNMEASURED


def _sections(file: ResultFile) -> Iterator[str]:
    rows = file.content["rows"]
    ms = {row["part"]: row["latency_ms"] for row in rows}
    columns = {
        "part of a layer": lambda row: row["part"],
        "ms": lambda row: f"{row['latency_ms']:.2f}",
        "extra GiB": lambda row: f"{row['extra_memory_gib'] or 0:.2f}",
    }
    yield Table.of(rows, columns).markdown() + "\n"
    plain = sum(ms[part] for part in _LAYER)
    added = ms["compensation, first-order"]
    shape = ModelShape()
    order = {kind: _order_ms(ms, kind) for kind in ("double-stream", "single-stream")}
    step = shape.double_layers * order["double-stream"]
    step += shape.single_layers * order["single-stream"]
    yield (
        f"- Compensation of the first order adds {added:.1f} ms to the {plain:.1f} ms of scoring, "
        f"selection and attention: {added / plain:.1%}. The norms add {ms['norms']:.1f} ms where "
        "blocks are chosen, the log-sum-exp "
        f"{ms['attention and log-sum-exp'] - ms['attention']:.1f} ms.\n"
        f"- Token order adds {order['double-stream']:.1f} ms to a double-stream layer and "
        f"{order['single-stream']:.1f} ms to a single-stream one, {step:.0f} ms to a step.\n"
        f"- {rows[0]['n']:,} tokens, {rows[0]['heads']} heads of {rows[0]['head_dim']}, density "
        f"{rows[0]['density']:g}; {file.place}\n"
    )


def _order_ms(ms: dict[str, float], kind: str) -> float:
    """Additional milliseconds of a layer whose tokens are in another order."""
    prepared = (ms[f"{kind} preparation, {order}"] for order in ("hilbert", "raster"))
    return next(prepared) - next(prepared) + ms["output in the model's order"]
