"""Videos of earlier runs: what replaces them, what keeps them, and when they no longer count."""

import json
from pathlib import Path

import pytest
from command_line import SMALL, SPARSE, run_cli

from xattn_video import SparsityReport
from xattn_video.cli import generate_job
from xattn_video.errors import FileNotWrittenError
from xattn_video.files import check_output_path
from xattn_video.pipelines import generation, loading
from xattn_video.pipelines.item_folder import ItemFolder


@pytest.fixture(autouse=True)
def prompts(tmp_path):
    (tmp_path / "p.txt").write_text("first\nsecond\nthird\n")


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.mp4"))}


def test_videos_are_made_again_and_others_stay(generate, tmp_path):
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos/mine.mp4").write_text("mine")
    assert generate("--prompts-file=p.txt", "--dense")[0] == 0
    before = bytes_of(tmp_path / "videos")
    (tmp_path / "p.txt").write_text("first\nsecond\n")
    code, out, err = generate("--prompts-file=p.txt", "--dense", "--fps=12", "--overwrite")
    assert code == 0, err
    assert out.count("(replaced)") == 2
    after = bytes_of(tmp_path / "videos")
    assert after.keys() == before.keys()
    changed = {name for name in after if after[name] != before[name]}
    assert changed == {"first-seed0.mp4", "second-seed0.mp4"}
    # That of another prompt has other settings now.
    (tmp_path / "p.txt").write_text("first\nthird\n")
    _, out, err = generate("--prompts-file=p.txt", "--dense", "--fps=12")
    assert err.count(" exists already") == out.count("(replaced)") == 1


def test_with_the_same_settings_other_videos_still_count(generate, tmp_path):
    assert generate("--prompts-file=p.txt", "--dense")[0] == 0
    (tmp_path / "one.txt").write_text("first\n")
    code, out, err = generate("--prompts-file=one.txt", "--dense", "--overwrite")
    assert (code, out.count("(replaced)")) == (0, 1), err
    assert generate("--prompts-file=p.txt", "--dense")[2].count(" exists already") == 3


def test_a_model_that_cannot_be_loaded_costs_no_video(generate, monkeypatch, tmp_path):
    assert generate("--prompts-file=p.txt", "--dense")[0] == 0
    before = bytes_of(tmp_path / "videos")

    def fail(options):
        raise loading.PipelineLoadError("there is no such model")

    monkeypatch.setattr(loading, "load_pipeline", fail)
    assert generate("--prompts-file=p.txt", "--dense", "--overwrite")[0] != 0
    assert bytes_of(tmp_path / "videos") == before


def test_replaced_files_are_removed_with_the_first_item_that_is_made(tmp_path):
    folder = ItemFolder(tmp_path, tmp_path / "state", "start over")
    folder.adopt({"seed": 0})
    for name in ("a", "b"):
        (tmp_path / name).write_text("old")
        folder.add(name, [tmp_path / name], {})
    for seed in (1, 2):
        folder.adopt({"seed": seed}, overwrite=True)
        assert folder.record("a") is None
        assert (tmp_path / "a").read_text() == (tmp_path / "b").read_text() == "old"
    (tmp_path / "a").write_text("new")
    folder.add("a", [tmp_path / "a"], {})
    assert (tmp_path / "a").read_text() == "new"
    assert not (tmp_path / "b").exists()
    (tmp_path / "b").write_text("not of a run")
    folder.add("c", [tmp_path / "a"], {})
    assert (tmp_path / "b").exists()


def test_a_changed_video_of_the_same_size_is_made_again(generate, tmp_path):
    assert generate("--prompts-file=p.txt", "--dense")[0] == 0
    before = bytes_of(tmp_path / "videos")
    (tmp_path / "videos/second-seed0.mp4").write_bytes(bytes(len(before["second-seed0.mp4"])))
    code, out, err = generate("--prompts-file=p.txt", "--dense")
    assert (code, err.count(" exists already"), out.count("(replaced)")) == (0, 2, 1), err
    assert bytes_of(tmp_path / "videos") == before


def test_a_video_that_was_copied_still_counts(tmp_path):
    folder = ItemFolder(tmp_path, tmp_path / "state", "start over")
    folder.adopt({})
    (tmp_path / "a").write_text("a")
    folder.add("a", [tmp_path / "a"], {})
    (tmp_path / "a").unlink()
    (tmp_path / "a").write_text("a")
    assert folder.record("a") is not None


@pytest.mark.parametrize("names", [None, "[", '{"a": 1}'])
def test_lost_names_are_found_in_the_records(names, generate, monkeypatch, tmp_path):
    (tmp_path / "p.txt").write_text("first\nsecond\nfirst\n")
    assert generate("--prompts-file=p.txt", "--dense")[0] == 0
    file = tmp_path / "videos/resume/names.json"
    before = json.loads(file.read_text())
    file.unlink() if names is None else file.write_text(names)
    monkeypatch.setattr(loading, "load_pipeline", lambda options: pytest.fail("loaded"))
    code, _, err = generate("--prompts-file=p.txt", "--dense")
    assert code == 0, err
    warning, *lines = err.splitlines()
    assert warning.startswith("warning: 1 prompt repeats an earlier one")
    assert lines == [
        f"videos/{name}.mp4 exists already"
        for name in ("first-seed0", "second-seed0", "first-seed0-2")
    ]
    assert json.loads(file.read_text()) == before


def test_a_folder_that_was_moved_is_reported_where_it_is(tiny_pipeline, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    words = ["generate", "--model", tiny_pipeline, *SMALL, *SPARSE, "--prompts-file=p.txt"]
    assert run_cli(*words, "--output=old")[0] == 0
    (tmp_path / "old").rename(tmp_path / "new")
    more = ["--output=new", "--report=run.json", "--html=page.html"]
    code, out, err = run_cli(*words, *more)
    assert code == 0, err
    assert "page.html" in out
    runs = json.loads((tmp_path / "run.json").read_text())["runs"]
    assert [run["file"] for run in runs] == [
        f"new/{name}-seed0.mp4" for name in ("first", "second", "third")
    ]


def test_a_default_name_that_is_taken_meanwhile_is_numbered(generate, monkeypatch, tmp_path):
    real = generation.generate

    def generate_beside_another_run(*arguments):
        (tmp_path / "a-seed0.mp4").write_text("of another run")
        return real(*arguments)

    monkeypatch.setattr(generation, "generate", generate_beside_another_run)
    code, out, err = generate("--prompt=a", "--dense", "--report=run.json")
    assert code == 0, err
    assert "a-seed0-2.mp4\n" in out
    assert (tmp_path / "a-seed0.mp4").read_text() == "of another run"
    assert json.loads((tmp_path / "run.json").read_text())["runs"][0]["file"] == "a-seed0-2.mp4"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--schedule=s.json", "--report=s.json"], "--schedule and --report both name 's.json'"),
        (["--schedule=s.json", "--report=./s.json"], "--schedule and --report both name"),
        (["--prompts-file=s.json", "--report=s.json"], "--prompts-file and --report both name"),
    ],
)
def test_what_a_run_reads_is_not_replaced(words, message, generate, tmp_path):
    text = '{"points": [[0, 0.9]]}'
    (tmp_path / "s.json").write_text(text)
    prompt = [] if "--prompts-file=s.json" in words else ["--prompt=a"]
    code, _, err = generate(*prompt, *words)
    assert (code, message in err) == (2, True), err
    assert (tmp_path / "s.json").read_text() == text


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize(
    "words",
    [
        ["--report=o/resume/settings.json"],
        ["--report=o/resume/names.json"],
        ["--report=o/resume/items/a.json"],
        ["--report=link.json"],
        ["--html=o/resume/page.html"],
        ["--plot=o/resume"],
        ["--plot=o/resume/new/plots"],
    ],
    ids=lambda words: words[0],
)
@pytest.mark.parametrize("is_new", [True, False])
def test_the_records_of_a_run_are_not_replaced(words, is_new, generate, tmp_path):
    (tmp_path / "link.json").symlink_to("o/resume/settings.json")
    (tmp_path / "o/resume/locks").mkdir(parents=True) if not is_new else None
    code, out, err = generate("--prompts-file=p.txt", "--output=o", *SPARSE, *words)
    option = words[0].split("=")[0]
    assert (code, out) == (2, ""), err
    assert err.startswith(f"error: {option} cannot be written to ")
    assert err.endswith(": 'o/resume' holds the records of the run; use another.\n")
    assert err.count("\n") == 1
    assert (tmp_path / "o").exists() is not is_new


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize(
    "words",
    [
        ["generate", "--model=demo", "--prompt=a", "--output=o/resume/a.mp4"],
        ["generate", "--model=demo", "--prompt=a", "--report=o/resume/settings.json"],
        ["calibrate", "--model=demo", "--prompt=a", "--density=0.2", "--output=run/settings.json"],
        ["prefill", "--model=demo", "--report=run/items/a.json"],
        ["compare", "--model=demo", "--prompt=a", "--output=o/resume"],
        ["generate", "--model=demo", "--prompt=a", "--output=run/videos/a.mp4"],
        ["generate", "--model=demo", "--prompts-file=p.txt", "--output=run/videos"],
    ],
    ids=lambda words: f"{words[0]} {words[-1]}",
)
def test_no_command_replaces_the_records_of_another_run(words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in ("o/resume", "run"):
        (tmp_path / folder / "locks").mkdir(parents=True)
        (tmp_path / folder / "settings.json").touch()
    (tmp_path / "p.txt").write_text("a\n")
    code, _, err = run_cli(*words, "--device=cpu")
    assert code == 2
    assert "holds the records of a run; use another." in err


def test_files_named_like_records_are_written_where_no_run_is(tmp_path):
    (tmp_path / "locks").mkdir()
    for name in ("settings.json", "items/a.json", "resume/a.json", "run/report.json"):
        check_output_path(tmp_path / name, (".json",))
    (tmp_path / "run/locks").mkdir(parents=True)
    (tmp_path / "run/settings.json").touch()
    check_output_path(tmp_path / "run/report.json", (".json",))


def test_densities_do_not_replace_the_prompts_that_they_are_made_from(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "s.json").write_text("a\n")
    words = ["--model=demo", "--prompts-file=s.json", "--output=s.json", "--preset=fast"]
    code, _, err = run_cli("calibrate", *words)
    assert code == 2
    assert "--prompts-file and --output both name 's.json'" in err


def test_a_report_that_cannot_be_written_costs_no_video(generate, monkeypatch, tmp_path):
    def fail(path, content):
        raise FileNotWrittenError(path, "File too large")

    with monkeypatch.context() as patch:
        patch.setattr(generate_job, "write_json", fail)
        code, out, err = generate("--prompts-file=p.txt", "--dense", "--report=run.json")
    assert code == 1
    assert "failed:" not in err
    # After every video, and at the end.
    assert err.count("cannot write 'run.json': File too large") == 4
    assert "run.json" not in out
    code, _, err = generate("--prompts-file=p.txt", "--dense", "--report=run.json")
    assert (code, err.count(" exists already")) == (0, 3)
    assert len(json.loads((tmp_path / "run.json").read_text())["runs"]) == 3


def test_reports_pages_and_plots_that_are_replaced_say_so(generate, tmp_path):
    pytest.importorskip("matplotlib")
    named = ("--output=a.mkv", "--report=r.json", "--html=p.html", "--plot=d.png")
    for name in ("r.json", "p.html", "d.png"):
        (tmp_path / name).write_text("old")
    code, out, err = generate("--prompt=a", *SPARSE, *named)
    assert code == 0, err
    for name in ("r.json", "p.html", "d.png"):
        assert f"{name} (replaced)" in out
    assert "a.mkv (replaced)" not in out


def test_a_plot_that_cannot_be_written_is_not_named_and_the_rest_is(
    generate, monkeypatch, tmp_path
):
    def fail(report, path):
        raise FileNotWrittenError(path, "File too large")

    monkeypatch.setattr(SparsityReport, "plot", fail)
    (tmp_path / "p.txt").write_text("first\n")
    for words, expected in (
        (("--prompt=a", "--output=a.mp4", "--plot=a.png"), 1),
        (("--prompts-file=p.txt", "--output=v", "--plot=plots"), 0),
    ):
        code, out, err = generate(*words, *SPARSE, "--report=run.json")
        assert code == expected
        assert ".mp4" in out
        assert "run.json" in out
        assert ".png" not in out
        assert ".png': File too large" in err
        assert len(json.loads((tmp_path / "run.json").read_text())["runs"]) == 1


def test_a_run_that_makes_nothing_names_the_report_that_it_writes(generate):
    words = ("--prompts-file=p.txt", "--dense", "--report=run.json")
    assert generate(*words)[0] == 0
    code, out, err = generate(*words)
    assert (code, err.count(" exists already")) == (0, 3)
    assert out == "report     run.json (replaced)\n"
