"""The page of benchmarks: it says what the result files say, and the committed one is theirs."""

import json
import re
from pathlib import Path

import pytest

from benchmarks import results_writer, write_page
from benchmarks.benchmark_page import figure_names, render_page, render_readme_table
from benchmarks.figures import draw_figures, draw_parts
from benchmarks.results_files import RESULTS, ProblemRows, ResultFile, read_results
from benchmarks.whole_videos import read_whole_videos
from benchmarks.write_page import MARKS, marked_tables, with_tables

ROOT = Path(__file__).parents[1]
COMMON = {"heads": 24, "head_dim": 128, "dtype": "bfloat16", "extra_memory_gib": 0.5}
SHARES = ("density", "sampled_density", "kept_mass", "least_kept_mass")
SHARES += ("formula_density", "formula_kept_mass", "oracle_density")


def rows_of(problem, n, inputs="random"):
    """A dense row of each kind and one density by two backends; times grow with n."""
    scale = n / 100_000
    own = {"stride": 8, "threshold": 0.4, "density": 0.345}
    rows = [
        {"name": "dense", "backend": "flash-attn-4", "latency_ms": 250 * scale, "tflops": 690.0},
        {
            "name": "dense",
            "backend": "sdpa-padding-mask",
            "latency_ms": 450 * scale,
            "tflops": 9.0,
        },
        {"name": "scoring", "backend": None, "stride": 8, "latency_ms": 15 * scale},
        {"name": "selection", "backend": None, **own, "latency_ms": 1 * scale},
        {"name": "attention", "backend": "flash4", **own, "latency_ms": 100 * scale},
        {"name": "xattention", "backend": "flash4", **own, "latency_ms": 125 * scale},
        {"name": "xattention", "backend": "triton", **own, "latency_ms": 200 * scale},
    ]
    return [{"problem": problem, "inputs": inputs, "n": n, **COMMON, **row} for row in rows]


STEPS = [
    {
        "name": "step",
        "phase": phase,
        "backend": backend,
        "n": 119_056,
        "height": 720,
        "width": 1280,
        "num_frames": 129,
        "layers": [20, 40],
        "latency_ms": milliseconds,
        "density": density,
        "stride": 8,
        "peak_memory_gib": 36.3,
    }
    for phase, backend, milliseconds, density in [
        ("stock", "stock", 32_000, None),
        ("dense", "dense", 20_000, None),
        ("sparse", "flash4", 10_000, 0.345),
    ]
]


@pytest.fixture
def gpu_file():
    quality = {"stride": 8, "threshold": 0.9, **dict.fromkeys(SHARES, 0.625)}
    selection = {"problem": "layer-1", "inputs": "model", "n": 17_664, **COMMON, **quality}
    content = {
        "gpu": "A GPU",
        "versions": {"torch": "2.11", "triton": None},
        "commit": "abc",
        "date": "2026-01-01",
        "python": "3.11",
        "command": "python -m benchmarks.attention",
        "rows": [
            *rows_of("hunyuan", 119_056),
            *rows_of("8k", 8192),
            *rows_of("4k", 4096),
            {"name": "selection", "backend": None, "latency_ms": 1, **selection},
            *STEPS,
        ],
        "failures": [{"problem": "8k", "name": "dense", "backend": "fa2", "failure": "no\n way"}],
    }
    return ResultFile("attention-gpu", content)


def test_a_problem_has_its_dense_and_sparse_rows(gpu_file):
    page = render_page([gpu_file], [])
    assert "### hunyuan: 119,056 tokens, 24 heads of 128, bfloat16" in page
    assert "| flash-attn-4 | 298 | 690 | 0.50 |" in page
    assert "| 0.345 | 8 | flash4 | 17.9 | 1.19 | 119 | 149 | 2.00x | 3.60x | 0.50 |" in page
    # Its attention was not timed apart.
    assert "| 0.345 | 8 | triton | 17.9 | 1.19 |  | 238 | 1.25x | 2.25x | 0.50 |" in page


def test_sizes_are_in_order(gpu_file):
    page = render_page([gpu_file], [])
    small = page.index("| 4,096 | 10.2 (flash-attn-4) | 0.345 | 8 | flash4 | 5.12 | 2.00x |")
    assert small < page.index("| 8,192 | 20.5 (flash-attn-4)")


def test_the_size_from_which_it_pays_is_named(gpu_file):
    rows = [*rows_of("4k", 4096), *rows_of("8k", 8192), *rows_of("16k", 16_384)]
    for row in rows:
        if row["n"] == 4096 and row["backend"] == "triton":
            row["latency_ms"] *= 10
        if row["backend"] == "flash4":
            row["latency_ms"] *= 10
    page = render_page([ResultFile("x", gpu_file.content | {"rows": rows})], [])
    assert "- `triton`, stride 8, density 0.345: faster than dense from 8,192 tokens" in page
    assert "- `flash4`, stride 8, density 0.345: faster than dense at no measured size" in page


def test_steps_are_compared_with_both_dense_ones(gpu_file):
    page = render_page([gpu_file], [])
    assert "### A whole step, 720x1280, 129 frames (119,056 tokens), 60 layers" in page
    assert "| dense | dense |  |  | 20.00 | 1.60x |  | 36.3 |" in page
    assert "| sparse | flash4 | 8 | 0.345 | 10.00 | 3.20x | 2.00x | 36.3 |" in page


def test_a_compiled_step_says_so(gpu_file):
    rows = [step | {"compiled": True} for step in STEPS]
    compiled = ResultFile("step-gpu", gpu_file.content | {"rows": rows})
    assert "60 layers with random weights, torch.compile" in render_page([compiled], [])
    row = "| a denoising step, 720x1280, 129 frames, torch.compile |"
    assert row in render_readme_table([compiled], [])


def test_selections_and_failures_are_listed(gpu_file):
    page = render_page([gpu_file], [])
    assert "| layer-1 | 17664 | 8 | 0.9 | " + " | ".join(["0.625"] * 7) + " |" in page
    assert "- not measured: 8k dense fa2: no way" in page


def test_what_was_not_measured_has_no_section(gpu_file):
    content = gpu_file.content | {"rows": rows_of("8k", 8192), "failures": []}
    page = render_page([ResultFile("x", content)], [])
    for word in ("hunyuan", "A whole step", "Selections", "not measured"):
        assert word not in page.partition("## A GPU")[2]


def test_one_size_is_no_row_of_sizes(gpu_file):
    content = gpu_file.content | {"rows": rows_of("8k", 8192)}
    page = render_page([ResultFile("x", content)], [])
    assert "### 8k: 8,192 tokens" in page
    assert "By number of tokens" not in page


def test_the_readme_takes_the_fastest_backend(gpu_file):
    table = render_readme_table([gpu_file], []).splitlines()
    assert table[2] == (
        "| attention of one layer, 119,056 tokens, bfloat16 | A GPU | 0.345 "
        "| 298 ms (flash-attn-4) | 149 ms (flash4) | 2.00x | 3.60x |"
    )
    assert "8,192" in table[3]


def test_the_readme_takes_the_smallest_stride(gpu_file):
    totals = [row for row in gpu_file.content["rows"] if row["name"] == "xattention"]
    faster = [row | {"stride": 16, "latency_ms": row["latency_ms"] / 2} for row in totals]
    both = ResultFile("x", gpu_file.content | {"rows": faster + gpu_file.content["rows"]})
    assert render_readme_table([both], []) == render_readme_table([gpu_file], [])


def test_the_readme_shows_whole_steps_where_there_are_any(gpu_file):
    table = render_readme_table([gpu_file], []).splitlines()
    assert table[-1] == (
        "| a denoising step, 720x1280, 129 frames | A GPU | 0.345 | 20.0 s | 10.0 s "
        "| 2.00x | 3.20x |"
    )
    content = gpu_file.content | {"rows": rows_of("hunyuan", 119_056)}
    assert len(render_readme_table([ResultFile("x", content)], []).splitlines()) == 3


def test_a_device_has_one_heading(gpu_file):
    page = render_page([gpu_file, ResultFile("other", gpu_file.content)], [])
    assert page.count("## A GPU") == 1


def test_the_authors_rows_are_told_apart(gpu_file):
    columns = {"problem": "hunyuan", "inputs": "random", "n": 119_056, **COMMON, "stride": 8}
    estimate = {"name": "scoring", "backend": "x-attention", "threshold": 0.4, **columns}
    rows = [*gpu_file.content["rows"], estimate | {"latency_ms": 80.0}]
    page = render_page([ResultFile("x", gpu_file.content | {"rows": rows})], [])
    assert "|  | 8 | x-attention | 80 | included |  |  |  |  | 0.50 |" in page
    assert "| 0.345 | 8 | flash4 | 17.9 |" in page


def test_scores_of_8_bits_have_rows_of_their_own(gpu_file):
    rounded = {"precision": "float8", "stride": 8, "threshold": 0.4, "density": 0.345}
    columns = {"problem": "hunyuan", "inputs": "random", "n": 119_056, **COMMON, **rounded}
    rows = [
        *gpu_file.content["rows"],
        {"name": "scoring", "backend": None, "latency_ms": 7.0, **columns},
        {"name": "selection", "backend": None, "latency_ms": 2.0, **columns},
        {"name": "xattention", "backend": "flash4", "latency_ms": 119.0, **columns},
    ]
    page = render_page([ResultFile("x", gpu_file.content | {"rows": rows})], [])
    assert "| 0.345 | 8 (float8) | flash4 | 7 | 2 |  | 119 | 2.50x |" in page
    assert "| 0.345 | 8 | flash4 | 17.9 | 1.19 | 119 | 149 |" in page


def test_pictures_are_drawn(gpu_file, tmp_path):
    drawn = draw_figures([gpu_file], tmp_path)
    assert sorted(path.name for path in drawn) == sorted(figure_names(gpu_file).values())


def test_a_picture_splits_no_time_whose_scoring_is_not_known(gpu_file):
    whole = gpu_file.single_problems[0]
    legend = {text.get_text() for text in draw_parts(whole, "a GPU").legends[0].get_texts()}
    assert legend == {"dense", "scoring", "selection", "attention"}
    rest = ProblemRows(whole.name, tuple(row for row in whole.rows if row["name"] != "scoring"))
    legend = {text.get_text() for text in draw_parts(rest, "a GPU").legends[0].get_texts()}
    assert legend == {"dense", "scoring not timed"}


def test_gpus_come_first(tmp_path):
    for name, gpu in (("a", None), ("z", "A GPU")):
        (tmp_path / f"{name}.json").write_text(json.dumps({"gpu": gpu, "rows": []}))
    assert [file.stem for file in read_results(tmp_path)] == ["z", "a"]


def test_the_command_is_kept(monkeypatch):
    words = ["/x/benchmarks/attention.py", "--problem", "cpu-2k", "--output", "a.json", "--then"]
    monkeypatch.setattr("sys.argv", words)
    command = "python -m benchmarks.attention --problem cpu-2k --then"
    assert results_writer._command() == command


def test_the_committed_page_is_what_the_files_say():
    files, videos = read_results(), read_whole_videos()
    rerun = "; run python -m benchmarks.write_page --folder ."
    page = (ROOT / "docs/benchmarks.md").read_text(encoding="utf-8")
    assert page == render_page(files, videos), rerun
    pictures = {name for file in files for name in figure_names(file).values()}
    assert {path.name for path in (ROOT / "docs/images/benchmarks").iterdir()} == pictures, rerun


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*.json")), ids=lambda path: path.stem)
def test_result_files_follow_the_schema(path):
    content = json.loads(path.read_text(encoding="utf-8"))
    assert content.keys() >= {"gpu", "versions", "commit", "rows", "failures", "command"}
    names = {"dense", "scoring", "selection", "attention", "xattention", "step"}
    for row in content["rows"]:
        assert row["name"] in names
        assert row.keys() >= {"backend", "n", "heads", "head_dim", "dtype", "latency_ms"}
        assert "peak_memory_gib" in row


def test_pages_are_written_only_where_they_are_told(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tracked = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md"), *(ROOT / "docs").rglob("*.png")]
    before = [path.stat().st_mtime_ns for path in tracked]
    for words, code in (["--help"], 0), ([], 2):
        with pytest.raises(SystemExit) as left:
            write_page.main(words)
        assert left.value.code == code
    assert list(tmp_path.iterdir()) == []
    capsys.readouterr()
    # As the page itself tells people to type it.
    (words,) = re.findall(
        r"`python -m benchmarks\.write_page (.*?)`", (ROOT / "docs/benchmarks.md").read_text()
    )
    write_page.main(words.split())
    assert [path.stat().st_mtime_ns for path in tracked] == before
    written = tmp_path / "preview"
    assert [path.name for path in written.iterdir()] == ["docs"]
    page = written / "docs/benchmarks.md"
    assert page.read_text() == (ROOT / "docs/benchmarks.md").read_text()
    named = capsys.readouterr().out.split()
    assert f"{page.relative_to(tmp_path)}" in named
    for picture in (written / "docs/images/benchmarks").iterdir():
        assert str(picture.relative_to(tmp_path)) in named


def test_a_readme_gets_its_table_and_pictures_that_are_no_longer_shown_go(tmp_path):
    readme, pictures = tmp_path / "README.md", tmp_path / "docs/images/benchmarks"
    begin, end = MARKS
    marks = ("first command", "benchmarks", "presets", "long context")
    tables = [f"{begin.format(mark)}old{end.format(mark)}" for mark in marks]
    readme.write_text("\nb\n".join(tables))
    pictures.mkdir(parents=True)
    (pictures / "gone.png").write_text("")
    write_page.write_pages(tmp_path)
    assert "old" not in readme.read_text()
    assert not (pictures / "gone.png").exists()


PAGES_WITH_TABLES = [
    "README.md",
    "docs/fewer-blocks.md",
    "docs/multi_gpu.md",
    "docs/long_context.md",
    "docs/language_demo_model.md",
    "docs/recipes/first_block_cache.md",
    "docs/recipes/fp8.md",
    "docs/recipes/small_cards.md",
]


@pytest.mark.parametrize("name", PAGES_WITH_TABLES)
def test_the_tables_of_a_page_are_what_the_files_say(name):
    pages = marked_tables(read_results(), read_whole_videos())
    assert [*pages] == PAGES_WITH_TABLES
    text = (ROOT / name).read_text(encoding="utf-8")
    assert with_tables(text, pages[name]) == text, "run python -m benchmarks.write_page --folder ."
