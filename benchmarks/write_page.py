"""Writes docs/benchmarks.md, its pictures and the README's table from benchmarks/results.

python -m benchmarks.write_page
"""

from pathlib import Path

from benchmarks.benchmark_page import IMAGES, render_page, render_readme_table
from benchmarks.figures import draw_figures
from benchmarks.results_files import read_results
from benchmarks.whole_videos import read_whole_videos
from xattn_video.reporting.pages import replace_between

ROOT = Path(__file__).parents[1]
BEGIN, END = "<!-- benchmarks: begin -->\n", "\n<!-- benchmarks: end -->"


def main() -> None:
    files, videos = read_results(), read_whole_videos()
    (ROOT / "docs/benchmarks.md").write_text(render_page(files, videos), encoding="utf-8")
    readme = ROOT / "README.md"
    text, table = readme.read_text(encoding="utf-8"), render_readme_table(files, videos)
    readme.write_text(replace_between(text, BEGIN, END, table), encoding="utf-8")
    pictures = ROOT / "docs" / IMAGES
    for picture in pictures.glob("*.png"):
        picture.unlink()
    draw_figures(files, pictures)


if __name__ == "__main__":
    main()
