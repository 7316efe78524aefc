"""A second run of a command: it goes on, refuses other settings, tries again what failed."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from command_line import SMALL, SPARSE, run_cli
from filelock import FileLock

from xattn_video.measure import comparison
from xattn_video.pipelines import generation, loading

ROOT = Path(__file__).parents[1]
PROMPTS = "first\nsecond\nthird\n"
GRID = ["--block-size=16", "--min-tokens=0", "--warmup-steps=1", "--thresholds=0.6"]
FEW_STEPS = "--num-inference-steps=2"
TIMES = {"seconds", "speedup", "step_speedup", "dense_step_seconds", "sparse_step_seconds"}


@pytest.fixture
def compare(tiny_pipeline, tmp_path, monkeypatch):
    """Run `compare` on the tiny pipeline within an empty folder."""
    monkeypatch.chdir(tmp_path)

    def run_compare(*arguments: object) -> tuple[int, str, str]:
        return run_cli("compare", "--model", tiny_pipeline, *SMALL, *GRID, FEW_STEPS, *arguments)

    return run_compare


@pytest.fixture(autouse=True)
def prompts(tmp_path):
    (tmp_path / "p.txt").write_text(PROMPTS)


@pytest.fixture
def fail_at(monkeypatch):
    """Make the generation of a prompt fail, within the test or a part of it."""

    def fail(prompt: str, patch=monkeypatch):
        real = generation.generate_together

        def generate_or_fail(pipe, requests, *arguments):
            if requests[0].prompt == prompt and requests[0].video.num_inference_steps > 1:
                raise RuntimeError("CUDA out of memory")
            return real(pipe, requests, *arguments)

        for owner in (generation, comparison):
            patch.setattr(owner, "generate_together", generate_or_fail)

    return fail


def kill_when(words: list[str], folder: Path, ready) -> None:
    """Run a command in a process of its own, and send it SIGKILL as soon as ``ready()``."""
    process = subprocess.Popen(
        [sys.executable, "-m", "xattn_video", *map(str, words)],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    ends = time.monotonic() + 240
    while not ready() and process.poll() is None and time.monotonic() < ends:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    _, err = process.communicate()
    assert process.returncode == -signal.SIGKILL, err.decode()


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.mp4"))}


def without_times(value):
    """Results without what differs from run to run."""
    if isinstance(value, dict):
        return {k: without_times(v) for k, v in value.items() if k not in TIMES | {"command"}}
    return [without_times(part) for part in value] if isinstance(value, list) else value


def results(folder: Path):
    return without_times(json.loads((folder / "results.json").read_text()))


def items(folder: Path) -> list[Path]:
    """Records that are whole: a temporary file's name begins with a dot."""
    return sorted((folder / "resume/items").glob("[!.]*.json"))


def test_a_killed_run_of_prompts_goes_on(generate, tiny_pipeline, tmp_path):
    words = ["--prompts-file=p.txt", "--dense", "--report=run.json"]
    assert generate(*words, "--output=whole")[0] == 0
    command = ["generate", "--model", tiny_pipeline, *SMALL, *words, "--output=o"]
    kill_when(command, tmp_path, lambda: items(tmp_path / "o"))
    done = len(items(tmp_path / "o"))
    assert 1 <= done < 3
    code, _, err = generate(*words, "--output=o")
    assert code == 0, err
    assert err.count(" exists already\n") == done
    assert bytes_of(tmp_path / "o") == bytes_of(tmp_path / "whole")
    runs = json.loads((tmp_path / "run.json").read_text())["runs"]
    assert [run["prompt"] for run in runs] == PROMPTS.split()


def test_a_second_run_loads_no_model_and_makes_nothing(generate, monkeypatch, tmp_path):
    assert generate("--prompts-file=p.txt", "--dense")[0] == 0
    before = bytes_of(tmp_path / "videos")
    assert len(before) == 3
    monkeypatch.setattr(loading, "load_pipeline", lambda options: pytest.fail("loaded"))
    code, _, err = generate("--prompts-file=p.txt", "--dense", "--report=run.json")
    assert code == 0, err
    assert err.count(" exists already\n") == 3
    assert bytes_of(tmp_path / "videos") == before
    assert len(json.loads((tmp_path / "run.json").read_text())["runs"]) == 3


def test_a_prompt_that_is_added_or_comes_twice_is_made_alone(generate, tmp_path):
    assert generate("--prompts-file=p.txt", "--dense")[0] == 0
    before = bytes_of(tmp_path / "videos")
    (tmp_path / "p.txt").write_text("fourth\nsecond\nfirst\nsecond\nthird\n")
    code, _, err = generate("--prompts-file=p.txt", "--dense")
    assert code == 0, err
    after = bytes_of(tmp_path / "videos")
    assert set(after) - set(before) == {"fourth-seed0.mp4", "second-seed0-2.mp4"}
    assert {name: after[name] for name in before} == before
    assert after["second-seed0-2.mp4"] == after["second-seed0.mp4"]


def test_a_video_that_was_not_noted_is_replaced_and_not_numbered(generate, tmp_path):
    """As if the process were killed between the video and its record."""
    assert generate("--prompts-file=p.txt", "--dense")[0] == 0
    before = bytes_of(tmp_path / "videos")
    items(tmp_path / "videos")[0].unlink()
    code, out, err = generate("--prompts-file=p.txt", "--dense")
    assert code == 0, err
    assert out.count("(replaced)") == 1
    assert bytes_of(tmp_path / "videos") == before


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff"])
def test_a_prompt_whose_record_is_broken_or_whose_video_is_cut_is_made_again(
    content, generate, tmp_path
):
    assert generate("--prompts-file=p.txt", "--dense")[0] == 0
    before = bytes_of(tmp_path / "videos")
    items(tmp_path / "videos")[0].write_bytes(content)
    if not content:
        (tmp_path / "videos/first-seed0.mp4").write_bytes(b"cut")
    code, _, err = generate("--prompts-file=p.txt", "--dense")
    assert code == 0, err
    assert bytes_of(tmp_path / "videos") == before


def test_other_settings_are_refused(generate, tmp_path, monkeypatch):
    (tmp_path / "p.txt").write_text("first\n")
    assert generate("--prompts-file=p.txt", *SPARSE)[0] == 0
    before = bytes_of(tmp_path / "videos")
    monkeypatch.setattr(loading, "load_pipeline", lambda options: pytest.fail("loaded"))
    for words, difference in (
        ([*SPARSE, "--num-inference-steps=3"], "--num-inference-steps 4 and 3 (in the folder"),
        ([*SPARSE, "--seed=1"], "seed 0 and 1 (in the folder"),
        ([*SPARSE, "--fps=12"], "fps 24 and 12 (in the folder"),
        ([*SPARSE, "--threshold=0.9"], "threshold 0.8 and 0.9 (in the folder"),
        ([*SPARSE[:-1], "--dense"], "sparse {"),
    ):
        code, _, err = generate("--prompts-file=p.txt", *words)
        assert code == 2
        assert f"'videos' holds a run with other settings: {difference}" in err
        assert "give another --output, the same settings, or --overwrite to start over" in err
    assert bytes_of(tmp_path / "videos") == before


def test_a_prompt_that_fails_ends_no_batch_and_is_tried_again(
    generate, fail_at, monkeypatch, tmp_path
):
    with monkeypatch.context() as patch:
        fail_at("second", patch)
        code, _, err = generate("--prompts-file=p.txt", "--dense", "--report=run.json")
    assert code == 1
    assert "failed: second-seed0.mp4: RuntimeError: CUDA out of memory" in err
    assert err.splitlines()[-1] == (
        "error: 1 of 3 videos failed, as listed above and in videos/resume/failures; "
        "run the same command again to retry them; the others are kept."
    )
    assert set(bytes_of(tmp_path / "videos")) == {"first-seed0.mp4", "third-seed0.mp4"}
    (failure,) = (tmp_path / "videos/resume/failures").iterdir()
    assert json.loads(failure.read_text())["error"] == "RuntimeError: CUDA out of memory"
    code, _, err = generate("--prompts-file=p.txt", "--dense", "--report=run.json")
    assert code == 0, err
    assert err.count(" exists already\n") == 2
    assert not list((tmp_path / "videos/resume/failures").iterdir())
    runs = json.loads((tmp_path / "run.json").read_text())["runs"]
    assert [run["prompt"] for run in runs] == PROMPTS.split()


def test_three_failures_in_a_row_stop_the_batch(generate, monkeypatch, tmp_path):
    calls = []

    def fail(pipe, request, progress):
        calls.append(request.prompt)
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(generation, "generate", fail)
    (tmp_path / "p.txt").write_text("a\nb\nc\nd\n")
    code, _, err = generate("--prompts-file=p.txt", "--dense")
    assert code == 1
    assert calls == ["a", "b", "c"]
    assert "3 videos failed in a row, the last with RuntimeError: an illegal" in err


@pytest.mark.parametrize("command", ["generate", "compare"])
def test_two_processes_do_not_share_a_folder(command, generate, compare, tmp_path, monkeypatch):
    monkeypatch.setattr(loading, "load_pipeline", lambda options: pytest.fail("loaded"))
    (tmp_path / "o/resume/locks").mkdir(parents=True)
    run = {"generate": generate, "compare": compare}[command]
    with FileLock(tmp_path / "o/resume/locks/run"):
        code, _, err = run("--prompts-file=p.txt", "--output=o")
    assert code == 2
    assert "another process is generating into 'o' already; wait for it." in err


def test_a_killed_comparison_goes_on(compare, tiny_pipeline, tmp_path):
    words = ["--prompts-file=p.txt", FEW_STEPS]
    assert compare(*words, "--output=whole")[0] == 0
    command = ["compare", "--model", tiny_pipeline, *SMALL, *GRID, *words, "--output=o"]
    kill_when(command, tmp_path, lambda: items(tmp_path / "o"))
    done = len(items(tmp_path / "o"))
    assert 1 <= done < 3
    code, out, err = compare(*words, "--output=o")
    assert code == 0, err
    assert f"{done} of 3 prompts and seeds are already done" in err
    assert "tau 0.6" in out
    assert results(tmp_path / "o") == results(tmp_path / "whole")
    videos = {path.relative_to(tmp_path / "o") for path in (tmp_path / "o").rglob("*.m*")}
    expected = {
        path.relative_to(tmp_path / "whole") for path in (tmp_path / "whole").rglob("*.m*")
    }
    assert videos == expected


def test_a_second_comparison_loads_no_model(compare, monkeypatch, tmp_path):
    assert compare("--prompt=first", "--no-videos")[0] == 0
    before = (tmp_path / "compare/results.json").read_text()
    page = (tmp_path / "compare/results.md").read_text()
    monkeypatch.setattr(loading, "load_pipeline", lambda options: pytest.fail("loaded"))
    code, out, err = compare("--prompt=first", "--no-videos")
    assert code == 0, err
    assert "tau 0.6" in out
    assert (tmp_path / "compare/results.json").read_text() == before
    assert (tmp_path / "compare/results.md").read_text() == page


def test_a_comparison_of_other_settings_is_refused(compare, monkeypatch):
    assert compare("--prompt=first", "--no-videos")[0] == 0
    monkeypatch.setattr(loading, "load_pipeline", lambda options: pytest.fail("loaded"))
    for words, difference in (
        (["--prompt=first", "--seeds=1"], "seeds [0] and [1]"),
        (["--prompt=another"], 'prompts ["first"] and ["another"]'),
        (
            ["--prompt=first", "--thresholds=0.3"],
            "tau0.6-warmup1-stride8 present and absent; tau0.3-warmup1-stride8 absent and present",
        ),
        (["--prompt=first", "--no-kept-mass"], "--kept-mass true and false"),
    ):
        code, _, err = compare("--no-videos", *words)
        assert code == 2
        assert f"'compare' holds a run with other settings: {difference}" in err
        assert "or --overwrite to start over" in err


def test_a_comparison_is_overwritten_when_asked(compare, tmp_path):
    assert compare("--prompt=first", "--no-videos")[0] == 0
    code, _, err = compare("--prompt=another", "--no-videos", "--no-kept-mass", "--overwrite")
    assert code == 0, err
    videos = results(tmp_path / "compare")["videos"]
    assert {video["prompt"] for video in videos} == {"another"}


def test_results_of_unknown_settings_are_overwritten_only_when_asked(compare, tmp_path):
    (tmp_path / "compare").mkdir()
    (tmp_path / "compare/results.json").write_text("old")
    code, _, err = compare("--prompt=first", "--no-videos")
    assert code == 2
    assert "'compare' already holds results.json" in err
    code, _, err = compare("--prompt=first", "--no-videos", "--overwrite")
    assert code == 0, err
    assert results(tmp_path / "compare")["rows"]


def test_what_failed_in_a_comparison_is_tried_again(compare, fail_at, monkeypatch, tmp_path):
    words = ["--prompts-file=p.txt", "--no-videos", "--no-kept-mass", "--no-noise-ceiling"]
    assert compare(*words, "--output=whole")[0] == 0
    with monkeypatch.context() as patch:
        fail_at("first", patch)
        code, _, err = compare(*words, "--output=o")
    assert code == 1
    assert "failed: 1/3 first: RuntimeError: CUDA out of memory" in err
    assert "1 of 3 videos failed, as listed above and in o/resume/failures" in err
    # A record that a crash of the machine left empty counts as none.
    items(tmp_path / "o")[0].write_bytes(b"")
    code, _, err = compare(*words, "--output=o")
    assert code == 0, err
    assert "1 of 3 prompts and seeds are already done" in err
    assert results(tmp_path / "o") == results(tmp_path / "whole")


def test_a_plot_of_a_finished_video_is_named_with_what_draws_it(generate, tmp_path):
    (tmp_path / "p.txt").write_text("a red circle\n")
    assert generate("--prompts-file=p.txt", "--output=v", *SPARSE)[0] == 0
    words = ("--prompts-file=p.txt", "--output=v", *SPARSE, "--plot=plots", "--html=new/p.html")
    code, out, err = generate(*words)
    assert code == 0, err
    assert "is missing: --overwrite generates the video again" in err.replace("\n", " ")
    assert "page       new/p.html" in out
    assert (tmp_path / "new/p.html").exists()
