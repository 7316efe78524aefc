"""Writes docs/benchmarks.md, its pictures and the README's table from benchmarks/results.

python -m benchmarks.write_page
"""

from pathlib import Path

from benchmarks.benchmark_page import IMAGES, render_page, render_readme_table
from benchmarks.figures import draw_figures
from benchmarks.results_files import read_results
from benchmarks.whole_videos import read_whole_videos

ROOT = Path(__file__).parents[1]
BEGIN, END = "<!-- benchmarks: begin -->\n", "\n<!-- benchmarks: end -->"


def main() -> None:
    files, videos = read_results(), read_whole_videos()
    (ROOT / "docs/benchmarks.md").write_text(render_page(files, videos), encoding="utf-8")
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8")
    readme.write_text(replace_table(text, render_readme_table(files, videos)), encoding="utf-8")
    pictures = ROOT / "docs" / IMAGES
    for picture in pictures.glob("*.png"):
        picture.unlink()
    draw_figures(files, pictures)


def replace_table(text: str, table: str) -> str:
    """The README with another table between its marks.

    Raises:
        ValueError: The marks are not there.
    """
    if BEGIN not in text or END not in text:
        raise ValueError(f"the README must hold {BEGIN.strip()} and {END.strip()}; put them back.")
    before, rest = text.split(BEGIN, 1)
    return before + BEGIN + table + END + rest.split(END, 1)[1]


if __name__ == "__main__":
    main()
