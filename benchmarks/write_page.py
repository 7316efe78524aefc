"""Writes docs/benchmarks.md, its pictures and the README's tables from benchmarks/results.

    python -m benchmarks.write_page --folder preview    # the page and its pictures, as a preview
    python -m benchmarks.write_page --folder .          # this repository's page and README

It replaces docs/benchmarks.md in the folder, its pictures, and the tables in README.md,
docs/fewer-blocks.md, docs/multi_gpu.md, docs/long_context.md and docs/recipes if those files
exist; likewise what the package tells of a run at full size.
"""

import argparse
from pathlib import Path

from benchmarks import causal_table, front, prefill_table, residual_age
from benchmarks.benchmark_page import IMAGES, render_page, render_readme_table
from benchmarks.figures import draw_figures
from benchmarks.recipe_tables import render_recipes
from benchmarks.results_files import read_results
from benchmarks.several_gpus import parts_record, render_several_gpus
from benchmarks.step_tables import (
    PRESETS_BEGIN,
    PRESETS_END,
    render_presets,
    render_step_pages,
)
from benchmarks.whole_videos import full_size_record, read_whole_videos
from xattn_video.files import user_path, write_figure, write_json, write_text
from xattn_video.reporting.console import run_script
from xattn_video.reporting.pages import replace_between

FULL_SIZE = Path("xattn_video/measure/full_size.json")
BEGIN, END = "<!-- benchmarks: begin -->\n", "\n<!-- benchmarks: end -->"


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--folder", type=user_path, required=True, help="holds docs/ and perhaps a README.md"
    )
    write_pages(parser.parse_args(words).folder)


def write_pages(folder: Path) -> None:
    """Write all files in ``folder`` and print their names; render everything before writing."""
    files, videos = read_results(), read_whole_videos()
    pages = {folder / "docs/benchmarks.md": render_page(files, videos)}
    readme = folder / "README.md"
    if readme.exists():
        table = render_readme_table(files, videos)
        text = replace_between(readme.read_text(encoding="utf-8"), BEGIN, END, table)
        pages[readme] = replace_between(text, PRESETS_BEGIN, PRESETS_END, render_presets())
    pictures = folder / "docs" / IMAGES
    drawn = draw_figures(files, pictures)
    pages |= render_step_pages(folder / "docs")
    pages |= render_recipes(folder / "docs", videos)
    if (folder / "docs/fewer-blocks.md").exists():
        pictures_of_steps = {
            front.NAME: front.draw_front(front.read_points()),
            residual_age.NAME: residual_age.draw_ages(),
        }
        for name, figure in pictures_of_steps.items():
            drawn.append(folder / "docs/images" / name)
            write_figure(drawn[-1], figure, dpi=120)
    several = folder / "docs/multi_gpu.md"
    if several.exists():
        pages[several] = render_several_gpus(several, videos)
    prefills = folder / "docs/long_context.md"
    if prefills.exists():
        text = prefills.read_text(encoding="utf-8")
        for table in (prefill_table, causal_table):
            text = replace_between(text, table.BEGIN, table.END, table.render())
        pages[prefills] = text
    for picture in set(pictures.glob("*.png")) - set(drawn):
        picture.unlink()
    for path, text in pages.items():
        write_text(path, text)
    carried = [folder / FULL_SIZE] if (folder / FULL_SIZE).exists() else []
    for path in carried:
        write_json(path, {"whole": full_size_record(videos), "parts": parts_record(videos)})
    for path in (*pages, *carried, *drawn):
        print(f"wrote {path}")


if __name__ == "__main__":
    run_script(main)
