"""Write the results in docs/quality.md, tables and plots, from results.json files.

    python -m scripts.write_quality_page runs/demo/results.json --page runs/demo/quality.md
    python -m scripts.write_quality_page benchmarks/results/quality/*.json \\
        --page docs/quality.md --grid README.md

Each file becomes a section, in the given order; if a file is missing, nothing is written.
The plots go to `images` next to the page. An existing page keeps its text outside the marks.
`--grid` also writes the PSNR of the first file, by threshold and warm-up steps, into another page.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from xattn_video.files import check_output_path, user_path, write_text
from xattn_video.measure.comparison_page import (
    comparison_rows,
    comparison_text,
    comparison_title,
    psnr_grid,
)
from xattn_video.measure.comparison_plots import write_plots
from xattn_video.reporting.endings import run_script
from xattn_video.reporting.pages import replace_between

BEGIN = "<!-- results: begin, written by scripts/write_quality_page.py -->\n"
END = "<!-- results: end -->"
GRID_BEGIN = "<!-- quality: begin, written by scripts/write_quality_page.py -->\n"
GRID_END = "<!-- quality: end -->"


def main() -> int:
    """Write the page; returns 0, or 1 if it cannot be written."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", nargs="+", type=user_path, help="results.json files")
    parser.add_argument(
        "--page", type=user_path, required=True, help="the page to write or create"
    )
    parser.add_argument(
        "--grid", type=user_path, help="another page to write the PSNR grid of the first file into"
    )
    arguments = parser.parse_args()
    page, grid = arguments.page, arguments.grid
    try:
        records = read_records(arguments.results)
        if grid is not None:
            if grid.resolve() == page.resolve():
                raise ValueError(f"--grid and --page both name {str(page)!r}; give two pages.")
            _check_page(grid, GRID_BEGIN, GRID_END, what="grid")
            table = psnr_grid(next(iter(records.values())))
        write_page(page, records)
        if grid is not None:
            write_between(grid, GRID_BEGIN, GRID_END, table)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def read_records(results: list[Path]) -> dict[str, dict[str, Any]]:
    """The content of results.json files, by the name of the run.

    Raises:
        ValueError: A file does not exist or holds no results, or two have the same name.
    """
    missing = [str(path) for path in results if not path.is_file()]
    if missing:
        raise ValueError(f"there is no file {missing[0]!r}; nothing was written.")
    names = [run_name(path) for path in results]
    if len(set(names)) < len(names):
        raise ValueError(f"the runs need different names, got {', '.join(names)}; rename one.")
    records = dict(zip(names, map(read_record, results), strict=True))
    for record in records.values():
        comparison_rows(record)
    return records


def write_page(page: Path, records: dict[str, dict[str, Any]]) -> None:
    """Replace the content between the two marks of the page.

    Args:
        page: A Markdown file; the plots go to ``images`` beside it.
        records: The content of results.json files, by the name of the run.

    Raises:
        ValueError: The page lacks the marks, or cannot be written.
    """
    _check_page(page, BEGIN, END, what="page")
    sections = [section(page.parent, name, record) for name, record in records.items()]
    write_between(page, BEGIN, END, "\n" + "".join(sections))


def write_between(page: Path, begin: str, end: str, content: str) -> None:
    """Replace the content between two marks of a page, and print the page's name."""
    write_text(page, replace_between(_text_of(page, begin, end), begin, end, content))
    print(f"wrote {page}")


def _check_page(page: Path, begin: str, end: str, *, what: str) -> None:
    """Raise ValueError if the page lacks its marks or cannot be written, before that is tried."""
    check_output_path(page, (".md",), what=what)
    replace_between(_text_of(page, begin, end), begin, end, "")


def _text_of(page: Path, begin: str, end: str) -> str:
    """The text of a page; a new page if it does not exist."""
    if page.exists():
        return page.read_text(encoding="utf-8")
    return f"# Quality\n\n{begin}{end}\n"


def run_name(path: Path) -> str:
    """The name of the file, or of its folder if the file is called results.json."""
    return path.resolve().parent.name if path.stem == "results" else path.stem


def read_record(path: Path) -> dict[str, Any]:
    """A run's results.json."""
    try:
        record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{str(path)!r} is not valid JSON: {error}; create it again.") from None
    return record


def section(folder: Path, name: str, record: dict[str, Any]) -> str:
    """The heading, facts, table and plots of a run; draws the plots in ``folder``."""
    rows = comparison_rows(record)
    images = folder / "images"
    plots = write_plots(images / f"quality-{name}", rows, record["layer_densities"])
    links = [plot.relative_to(folder).as_posix() for plot in plots]
    return f"### {comparison_title(record)}\n\n{comparison_text(record, links)}\n"


if __name__ == "__main__":
    run_script(main)
