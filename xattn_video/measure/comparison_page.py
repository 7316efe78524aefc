"""A comparison's results as Markdown, from what results.json holds of them."""

from collections.abc import Mapping, Sequence
from typing import Any

from xattn_video.measure.comparison_rows import MethodRow, table_cells

_PICTURES = {
    "psnr-density": "PSNR against density",
    "psnr-grid": "PSNR by threshold and warm-up steps",
    "density-layers": "Density by denoising step and layer",
}


def comparison_rows(record: Mapping[str, Any]) -> list[MethodRow]:
    """The rows that a record holds.

    Raises:
        ValueError: It is no record of a comparison.
    """
    try:
        return [MethodRow.from_dict(values) for values in record["rows"]]
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"these are no results of `xattn-video compare`: {type(error).__name__} {error}; "
            "give the results.json of a run that generated videos."
        ) from None


def comparison_title(record: Mapping[str, Any]) -> str:
    """What was compared, where, and at which strides."""
    rows = comparison_rows(record)
    strides = sorted({row.method.sparse.stride for row in rows if row.method.sparse})
    at = f", stride {' and '.join(map(str, strides))}" if strides else ""
    return f"{_video_and_device(record)}{at}"


def _video_and_device(record: Mapping[str, Any]) -> str:
    video = record["video"]
    return (
        f"{record['model']}, {video['width']}x{video['height']}x{video['num_frames']}, "
        f"{record['device']}"
    )


def comparison_text(record: Mapping[str, Any], pictures: Sequence[str]) -> str:
    """How it was measured, the table, what could not be measured, and the plots.

    Args:
        record: The content of results.json.
        pictures: Paths of the plots, relative to the page.
    """
    rows = comparison_rows(record)
    video, versions = record["video"], record["versions"]
    facts = [
        f"- Prompts: {record['num_prompts']}; seeds: {', '.join(map(str, record['seeds']))}; "
        f"steps: {video['num_inference_steps']}; video tokens: {record['video_tokens']:,}; "
        f"videos in a call: {record['batch_size']}",
        f"- Device: {record['device']}, {record['dtype']}; "
        f"sparse backend: {', '.join(record['backends']) or 'none needed'}; "
        + ", ".join(f"{name} {version}" for name, version in versions.items()),
    ]
    missing = [f"- {name} is not measured: {why}" for name, why in record["missing"].items()]
    links = [f"![{_caption(path)}]({path})" for path in pictures]
    parts = [
        "\n".join(facts + missing),
        f"```bash\n{record['command']}\n```",
        markdown_table(*table_cells(rows)),
        *links,
    ]
    return "\n\n".join(parts) + "\n"


def psnr_grid(record: Mapping[str, Any]) -> str:
    """PSNR and density by threshold and warm-up steps, at the smallest stride, and what made it.

    Raises:
        ValueError: It is no record of a comparison.
    """
    settings = [(row.method.sparse, row) for row in comparison_rows(record) if row.method.sparse]
    stride = min(sparse.stride for sparse, _ in settings)
    cells = {
        (sparse.threshold, sparse.warmup_steps): _grid_cell(row)
        for sparse, row in settings
        if sparse.stride == stride and isinstance(sparse.threshold, float)
    }
    warmups = sorted({warmup for _, warmup in cells})
    headings = ["threshold", *(f"warm-up of {warmup}" for warmup in warmups)]
    lines = [
        [f"{tau:g}", *(cells.get((tau, warmup), "") for warmup in warmups)]
        for tau in sorted({tau for tau, _ in cells})
    ]
    facts = (
        f"{_video_and_device(record)}, {record['video']['num_inference_steps']} steps, "
        f"{record['num_prompts']} prompts, stride {stride}, backend "
        f"{', '.join(record['backends'])}:"
    )
    return f"{facts}\n\n{markdown_table(headings, lines)}\n"


def _grid_cell(row: MethodRow) -> str:
    if row.identical:
        return "identical"
    if row.psnr is None:
        return ""
    density = "" if row.density is None else f", density {row.density:.2f}"
    return f"{row.psnr:.1f} dB{density}"


def markdown_table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table, the first column to the left, figures to the right."""
    lines = [headings, ["---", *["---:"] * (len(headings) - 1)], *rows]
    return "\n".join(
        f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines
    )


def _caption(path: str) -> str:
    return next(text for name, text in _PICTURES.items() if path.endswith(f"{name}.png"))
