"""Writes docs/benchmarks.md, its pictures and the README's tables from benchmarks/results.

    python -m benchmarks.write_page --folder preview    # the page and its pictures, as a preview
    python -m benchmarks.write_page --folder .          # this repository's page and README

It replaces docs/benchmarks.md in the folder, its pictures, and, in existing files, the tables of
README.md, docs/fewer-blocks.md, docs/multi_gpu.md, docs/long_context.md,
docs/language_demo_model.md and docs/recipes, and the package's measurements at full size.
"""

import argparse
from collections.abc import Mapping
from pathlib import Path

from benchmarks import (
    calibration_table,
    causal_table,
    front,
    language_demo_tables,
    prefill_table,
    readme_lines,
    recipe_tables,
    residual_age,
    ruler_table,
    skipped_table,
)
from benchmarks.benchmark_page import IMAGES, render_page, render_readme_table
from benchmarks.figures import draw_figures
from benchmarks.results_files import RESULTS, ResultFile, read_results
from benchmarks.several_gpus import parts_record
from benchmarks.several_gpus import tables as several_gpus_tables
from benchmarks.step_tables import render_presets, render_steps
from benchmarks.whole_videos import WholeVideo, full_size_record, read_whole_videos
from xattn_video.files import user_path, write_figure, write_json, write_text
from xattn_video.language.model_sources import DEMO_FOLDER
from xattn_video.reporting.endings import run_script
from xattn_video.reporting.pages import replace_between

FULL_SIZE = Path("xattn_video/measure/full_size.json")
MARKS = "<!-- {}: begin, written by benchmarks.write_page -->\n", "<!-- {}: end -->"
"""Marks around each generated table in a page that people write."""
_AGAIN = RESULTS / "language_demo"
"""Of the language demo's training from scratch, with the script as it is."""


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--folder",
        type=user_path,
        required=True,
        help="folder with docs/ and, optionally, README.md",
    )
    write_pages(parser.parse_args(words).folder)


def write_pages(folder: Path) -> None:
    """Write all files in ``folder`` and print their names; everything is rendered first."""
    files, videos = read_results(), read_whole_videos()
    pages = {folder / "docs/benchmarks.md": render_page(files, videos)}
    for name, tables in marked_tables(files, videos).items():
        if (folder / name).exists():
            text = (folder / name).read_text(encoding="utf-8")
            pages[folder / name] = with_tables(text, tables)
    pictures = folder / "docs" / IMAGES
    figures = draw_figures(files, pictures)
    if (folder / "docs/fewer-blocks.md").exists():
        images = folder / "docs/images"
        figures[images / front.NAME] = front.draw_front(front.read_points())
        figures[images / residual_age.NAME] = residual_age.draw_ages()
    pictures.mkdir(parents=True, exist_ok=True)
    for path, figure in figures.items():
        write_figure(path, figure, dpi=120)
    for picture in set(pictures.glob("*.png")) - set(figures):
        picture.unlink()
    for path, text in pages.items():
        write_text(path, text)
    carried = [folder / FULL_SIZE] if (folder / FULL_SIZE).exists() else []
    for path in carried:
        write_json(path, {"whole": full_size_record(videos), "parts": parts_record(videos)})
    for path in (*pages, *carried, *figures):
        print(f"wrote {path}")


def marked_tables(files: list[ResultFile], videos: list[WholeVideo]) -> dict[str, dict[str, str]]:
    """{page: {mark: table}} of pages that people write."""
    return {
        "README.md": {
            "benchmarks": render_readme_table(files, videos) + "\n",
            "first command": readme_lines.first_command(),
            "presets": render_presets(),
            "long context": readme_lines.long_context(),
        },
        "docs/fewer-blocks.md": {
            "steps": render_steps(),
            "skipped": skipped_table.render(),
            "calibration": calibration_table.render(),
        },
        "docs/multi_gpu.md": several_gpus_tables(videos),
        "docs/long_context.md": {
            "prefills": prefill_table.render_prefills(),
            "causal": causal_table.render(),
            "ruler": ruler_table.render(),
        },
        "docs/language_demo_model.md": {
            "training": language_demo_tables.training(DEMO_FOLDER),
            "evaluation": language_demo_tables.evaluation(DEMO_FOLDER),
            "training again": language_demo_tables.training(_AGAIN),
            "evaluation again": language_demo_tables.evaluation(_AGAIN),
        },
        **recipe_tables.tables(videos),
    }


def with_tables(text: str, tables: Mapping[str, str]) -> str:
    """The page with new tables between their marks.

    Raises:
        ValueError: The page does not hold each mark exactly once.
    """
    for mark, table in tables.items():
        begin, end = (one.format(mark) for one in MARKS)
        text = replace_between(text, begin, end, table)
    return text


if __name__ == "__main__":
    run_script(main)
