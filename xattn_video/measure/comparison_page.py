"""The results of a comparison as Markdown, made from results.json."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from xattn_video.measure.comparison_rows import MethodRow, comparison_table
from xattn_video.reporting.pages import render
from xattn_video.reporting.tables import Table

_TEMPLATE = Path(__file__).with_name("comparison.md.jinja")

_PICTURES = {
    "psnr-density": "PSNR against density",
    "psnr-grid": "PSNR by threshold and warm-up steps",
    "density-layers": "Density by denoising step and layer",
}


def comparison_rows(record: Mapping[str, Any]) -> list[MethodRow]:
    """The rows of a record.

    Raises:
        ValueError: The record does not belong to a comparison.
    """
    try:
        return [MethodRow.from_dict(values) for values in record["rows"]]
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"this is not a result of `xattn-video compare`: {type(error).__name__} {error}; "
            "give the results.json of a run that generated videos."
        ) from None


def comparison_title(record: Mapping[str, Any]) -> str:
    """A title with the video, the device and the strides of a comparison."""
    rows = comparison_rows(record)
    strides = sorted({row.method.sparse.stride for row in rows if row.method.sparse})
    at = f", stride {' and '.join(map(str, strides))}" if strides else ""
    return f"{_video_and_device(record)}{at}"


def _video_and_device(record: Mapping[str, Any]) -> str:
    video = record["video"]
    return (
        f"{record['model']}, {video['width']}x{video['height']}x{video['num_frames']}, "
        f"{video['num_inference_steps']} steps, {record['device']}"
    )


def comparison_text(record: Mapping[str, Any], pictures: Sequence[str]) -> str:
    """The text of the page: the method, the table, what could not be measured, and the plots.

    Args:
        record: The content of results.json.
        pictures: Paths of the plots, relative to the page.
    """
    table = comparison_table(comparison_rows(record))
    captions = [
        (text, path)
        for path in pictures
        for name, text in _PICTURES.items()
        if path.endswith(f"{name}.png")
    ]
    return render(_TEMPLATE, record=record, table=table, pictures=captions)


def psnr_grid(record: Mapping[str, Any]) -> str:
    """PSNR and density by threshold and warm-up at the smallest stride, and the command.

    Raises:
        ValueError: The record does not belong to a comparison, or no row has a threshold.
    """
    settings = [(row.method.sparse, row) for row in comparison_rows(record) if row.method.sparse]
    stride = min((sparse.stride for sparse, _ in settings), default=0)
    cells = {
        (sparse.threshold, sparse.warmup_steps): _grid_cell(row)
        for sparse, row in settings
        if sparse.stride == stride and isinstance(sparse.threshold, float)
    }
    if not cells:
        raise ValueError("a PSNR grid needs rows with a threshold, got none; give another run.")
    taus, warmups = (sorted(set(values)) for values in zip(*cells, strict=True))

    def cell(warmup: int, tau: float) -> str:
        return cells.get((tau, warmup), "")

    columns: dict[str, Callable[[float], str]] = {"threshold": lambda tau: f"{tau:g}"}
    columns |= {f"warm-up of {warmup}": partial(cell, warmup) for warmup in warmups}
    facts = (
        f"{_video_and_device(record)}, {record['num_prompts']} prompts, stride {stride}, backend "
        f"{', '.join(record['backends'])}:"
    )
    return f"{facts}\n\n{Table.of(taus, columns).markdown()}\n"


def _grid_cell(row: MethodRow) -> str:
    if row.identical:
        return "identical"
    if row.psnr is None:
        return ""
    density = "" if row.density is None else f", density {row.density:.2f}"
    return f"{row.psnr:.1f} dB{density}"
