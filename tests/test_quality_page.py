"""docs/quality.md is written from results.json."""

import json
import re
import sys
from pathlib import Path

import pytest

from xattn_video.measure.comparison_rows import MethodRow
from xattn_video.measure.methods import DENSE, sparse_methods

ROOT = Path(__file__).parents[1]


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    from scripts import write_quality_page

    return write_quality_page


@pytest.fixture
def page(tmp_path, script):
    path = tmp_path / "docs" / "quality.md"
    path.parent.mkdir()
    path.write_text(f"# Before\n\n{script.BEGIN}a stale section\n{script.END}\n\nAfter.\n")
    return path


def record() -> dict:
    empty = dict.fromkeys(MethodRow.__dataclass_fields__)
    (method,) = sparse_methods({"threshold": [0.9], "warmup_steps": [1]})
    shared = {"num_videos": 2, "identical": False, "seconds": 1.5}
    sparse = {"psnr": 31.25, "density": 0.4, "still_followed": 0.75}
    rows = [
        MethodRow(**empty | shared | {"method": DENSE}),
        MethodRow(**empty | shared | {"method": method} | sparse),
    ]
    return {
        "command": "xattn-video compare --model demo",
        "versions": {"torch": "2.9"},
        "model": "demo",
        "device": "NVIDIA H100",
        "dtype": "bfloat16",
        "video": {"width": 256, "height": 256, "num_frames": 65, "num_inference_steps": 25},
        "video_tokens": 4352,
        "num_prompts": 2,
        "seeds": [0],
        "batch_size": 2,
        "missing": {"VMAF": "no ffmpeg."},
        "backends": ["triton"],
        "rows": [row.to_dict() for row in rows],
        "layer_densities": {method.name: [[None, 0.5], [None, 0.3]]},
    }


def run(script, monkeypatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["write_quality_page", *map(str, arguments)])
    return script.main()


def test_the_page_shows_the_runs_and_nothing_of_the_last_ones(script, page, tmp_path, monkeypatch):
    results = tmp_path / "demo-h100" / "results.json"
    results.parent.mkdir()
    results.write_text(json.dumps(record()))
    for _ in range(2):
        assert run(script, monkeypatch, results, "--page", page) == 0
    text = page.read_text()
    assert text.startswith("# Before\n")
    assert text.endswith("\n\nAfter.\n")
    assert "stale" not in text
    assert text.count("### demo, 256x256x65, 25 steps, NVIDIA H100, stride 8\n") == 1
    for shown in ("torch 2.9", "xattn-video compare --model demo", "31.25", "75.0%", "4,352"):
        assert shown in text
    assert "VMAF is not measured: no ffmpeg." in text
    for plot in ("psnr-density", "density-layers"):
        assert f"(images/quality-demo-h100-{plot}.png)" in text
        assert (page.parent / f"images/quality-demo-h100-{plot}.png").is_file()
    # One warm-up and one stride make no grid.
    assert "psnr-grid" not in text


def test_a_grid_of_psnr_goes_into_a_page_of_its_own(script, page, tmp_path, monkeypatch):
    results = tmp_path / "a.json"
    results.write_text(json.dumps(record()))
    readme = tmp_path / "README.md"
    readme.write_text(f"Before.\n\n{script.GRID_BEGIN}stale\n{script.GRID_END}\n\nAfter.\n")
    assert run(script, monkeypatch, results, "--page", page, "--grid", readme) == 0
    assert readme.read_text() == (
        f"Before.\n\n{script.GRID_BEGIN}"
        "demo, 256x256x65, 25 steps, NVIDIA H100, 2 prompts, stride 8, backend triton:\n\n"
        "| threshold | warm-up of 1 |\n| --- | ---: |\n| 0.9 | 31.2 dB, density 0.40 |\n"
        f"{script.GRID_END}\n\nAfter.\n"
    )


def test_a_missing_run_changes_no_page(script, page, tmp_path, monkeypatch, capsys):
    (tmp_path / "a.json").write_text(json.dumps(record()))
    assert run(script, monkeypatch, tmp_path / "a.json", "--page", page) == 0
    before = page.read_text()
    assert (
        run(script, monkeypatch, tmp_path / "a.json", tmp_path / "gone.json", "--page", page) == 1
    )
    assert "gone.json'; nothing was written" in capsys.readouterr().err
    assert page.read_text() == before


def test_a_grid_without_marks_changes_no_page(script, page, tmp_path, monkeypatch):
    (tmp_path / "a.json").write_text(json.dumps(record()))
    readme, before = tmp_path / "README.md", page.read_text()
    readme.write_text("No marks.\n")
    assert run(script, monkeypatch, tmp_path / "a.json", "--page", page, "--grid", readme) == 1
    assert (page.read_text(), readme.read_text()) == (before, "No marks.\n")


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        ("a.json/README.md", "grid cannot be written to"),
        ("README.txt", "grid must end in .md"),
        ("new.md", "--grid and --page both name"),
    ],
)
def test_a_grid_that_cannot_be_written_changes_no_page(
    script, tmp_path, monkeypatch, capsys, grid, message
):
    (tmp_path / "a.json").write_text(json.dumps(record()))
    words = [tmp_path / "a.json", "--page", tmp_path / "new.md", "--grid", tmp_path / grid]
    assert run(script, monkeypatch, *words) == 1
    assert message in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_the_folder_of_a_grid_is_made(script, page, tmp_path, monkeypatch):
    (tmp_path / "a.json").write_text(json.dumps(record()))
    words = [tmp_path / "a.json", "--page", page, "--grid", tmp_path / "new/grid.md"]
    assert run(script, monkeypatch, *words) == 0
    assert "31.2 dB" in (tmp_path / "new/grid.md").read_text()


def test_a_run_without_thresholds_has_no_grid(script, page, tmp_path, monkeypatch, capsys):
    dense, _ = (made := record())["rows"]
    (tmp_path / "a.json").write_text(json.dumps(made | {"rows": [dense]}))
    before, words = page.read_text(), [tmp_path / "a.json", "--page", page]
    assert run(script, monkeypatch, *words, "--grid", tmp_path / "grid.md") == 1
    assert "a PSNR grid needs rows with a threshold, got none" in capsys.readouterr().err
    assert page.read_text() == before


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not valid JSON"),
        ("{}", "this is not a result of `xattn-video compare`: KeyError 'rows'"),
        ('{"rows": [{}]}', "this is not a result of `xattn-video compare`: KeyError 'method'"),
    ],
)
def test_other_files_are_refused(script, page, tmp_path, monkeypatch, capsys, content, message):
    before = page.read_text()
    (tmp_path / "a.json").write_text(json.dumps(record()))
    (tmp_path / "b.json").write_text(content)
    words = [tmp_path / "a.json", tmp_path / "b.json", "--page", page]
    assert run(script, monkeypatch, *words) == 1
    assert message in capsys.readouterr().err
    assert page.read_text() == before
    assert [path.name for path in page.parent.iterdir()] == [page.name]


def test_runs_of_one_name_are_refused(script, tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(record()))
    with pytest.raises(ValueError, match="different names, got a, a"):
        script.read_records([tmp_path / "a.json", tmp_path / "a.json"])


def test_a_page_without_marks_is_refused(script, tmp_path):
    (tmp_path / "page.md").write_text("# No marks\n")
    with pytest.raises(ValueError, match="must hold these two lines once"):
        script.write_page(tmp_path / "page.md", {})


def test_the_page_of_the_docs_has_its_marks(script):
    text = (ROOT / "docs/quality.md").read_text()
    assert text.count(script.BEGIN) == text.count(script.END) == 1


def test_the_committed_pages_are_what_the_committed_results_give(
    script, page, tmp_path, monkeypatch
):
    results = sorted((ROOT / "benchmarks/results/quality").glob("*.json"))
    assert results
    copies = tmp_path / "docs" / "quality.md", tmp_path / "README.md"
    for copy in copies:
        copy.write_text((ROOT / copy.relative_to(tmp_path)).read_text())
    assert run(script, monkeypatch, *results, "--page", copies[0], "--grid", copies[1]) == 0
    fewer = tmp_path / "docs" / "fewer-blocks.md"
    fewer.write_text((ROOT / "docs/fewer-blocks.md").read_text())
    results = sorted((ROOT / "benchmarks/results/quality_fewer").glob("*.json"))
    assert run(script, monkeypatch, *results, "--page", fewer) == 0
    for copy in (*copies, fewer):
        assert copy.read_text() == (ROOT / copy.relative_to(tmp_path)).read_text()
    drawn = {path.name for path in (copies[0].parent / "images").iterdir()}
    assert drawn == {path.name for path in (ROOT / "docs/images").glob("quality-*")}


def test_it_writes_no_page_that_was_not_named(script, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.json").write_text(json.dumps(record()))
    tracked = ROOT / "docs/quality.md"
    before = tracked.read_bytes(), tracked.stat().st_mtime_ns
    for words, code in ((["a.json"], 2), (["--help"], 0)):
        with pytest.raises(SystemExit) as left:
            run(script, monkeypatch, *words)
        assert left.value.code == code
    assert "--page" in capsys.readouterr().err
    assert (tracked.read_bytes(), tracked.stat().st_mtime_ns) == before
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_a_page_that_is_not_there_is_made_and_named(script, tmp_path, monkeypatch, capsys):
    """As docs/quality.md tells people to type it."""
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "docs/quality.md").read_text()
    commands = set(re.findall(r"python -m scripts\.write_quality_page (runs.*)", text))
    (words,) = (command.split() for command in commands)
    Path("runs/demo").mkdir(parents=True)
    Path("runs/demo/results.json").write_text(json.dumps(record()))
    assert run(script, monkeypatch, *words) == 0
    assert "### demo, 256x256x65" in Path("runs/demo/quality.md").read_text()
    assert "wrote runs/demo/quality.md" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]
