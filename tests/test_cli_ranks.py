"""`xattn-video generate` on several ranks: the same video, and one line where a rank fails."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from command_line import SMALL, SPARSE
from launched import LAUNCHERS, ROOT, launch, xattn_video

from xattn_video.cli import generate_job


@pytest.fixture
def words(tiny_pipeline):
    return ["generate", "--model", tiny_pipeline, *SMALL]


def without_balance(report):
    forwards = [{k: v for k, v in run.items() if k != "imbalance"} for run in report["forwards"]]
    return report | {"imbalance": None, "forwards": forwards}


def test_two_ranks_make_the_video_that_one_makes(words, generate, tmp_path):
    asked = ["--prompt=a red circle", *SPARSE, "--report=run.json"]
    assert generate(*asked, "--output=alone.mp4")[0] == 0
    alone = json.loads((tmp_path / "run.json").read_text())["runs"][0]
    first, second = launch([*words, *asked, "--output=both.mp4"], 2, tmp_path)
    assert (first.code, second.code) == (0, 0), first.err
    assert (tmp_path / "both.mp4").read_bytes() == (tmp_path / "alone.mp4").read_bytes()
    both = json.loads((tmp_path / "run.json").read_text())["runs"][0]
    assert 1 <= both["report"]["imbalance"] < 1.5
    assert "ranks      the busiest rank computes 1." in first.out
    assert without_balance(both["report"]) == without_balance(alone["report"])
    assert "2/4 steps x 3/3 layers sparse" in first.out
    assert "step 4/4  sparse" in first.err
    assert (second.out, second.err) == ("", "")


def end_and_name_threads():
    try:
        xattn_video()
    finally:
        print(*(path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")))


def test_no_thread_of_the_group_outlives_it(words, tmp_path):
    """Python aborts if it ends while threads of gloo run."""
    asked = [*words, "--prompt=a", "--dense", "--output=a.mp4"]
    ended = launch(asked, 2, tmp_path, entry=end_and_name_threads)
    assert [end.code for end in ended] == [0, 0], ended[0].err
    assert all("gloo" not in end.out for end in ended)


def test_dense_videos_of_uneven_tokens_are_shared(words, generate, tmp_path):
    """5 x 3 x 3 = 45 video tokens on two ranks."""
    asked = ["--prompt=a", "--dense", "--num-frames=17", "--height=48", "--width=48"]
    assert generate(*asked, "--output=alone.mp4")[0] == 0
    first, second = launch([*words, *asked, "--output=both.mp4"], 2, tmp_path)
    assert (first.code, second.code) == (0, 0), first.err
    assert (tmp_path / "both.mp4").read_bytes() == (tmp_path / "alone.mp4").read_bytes()
    assert "dense in all 4 steps" in first.out


@pytest.fixture
def prompts(tmp_path):
    (tmp_path / "p.txt").write_text("first\nsecond\nthird\n")


def bytes_of(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.mp4"))}


@pytest.mark.usefixtures("prompts")
def test_prompts_are_dealt_out(words, generate, tmp_path):
    asked = ["--prompts-file=p.txt", *SPARSE, "--report=run.json"]
    assert generate(*asked, "--output=alone")[0] == 0
    first, second = launch([*words, *asked, "--output=both"], 2, tmp_path)
    assert (first.code, second.code) == (0, 0), first.err
    assert bytes_of(tmp_path / "both") == bytes_of(tmp_path / "alone")
    runs = json.loads((tmp_path / "run.json").read_text())["runs"]
    assert [run["prompt"] for run in runs] == ["first", "second", "third"]
    assert "[1] " in second.err
    # Named where it is written: by the first rank, at the end.
    assert (first.out.count("run.json"), second.out.count("run.json")) == (1, 0)
    min((tmp_path / "both/resume/items").iterdir()).unlink()
    first, second = launch([*words, *asked, "--output=both"], 2, tmp_path)
    assert (first.code, second.code) == (0, 0), first.err
    assert first.err.count(" exists already\n") == 2
    assert bytes_of(tmp_path / "both") == bytes_of(tmp_path / "alone")


def test_different_options_are_one_line(words, tmp_path):
    asked = [*words, "--prompt=a", "--dense", "--output=a.mp4"]
    first, second = launch({0: asked, 1: [*asked, "--num-frames=17"]}, 2, tmp_path)
    assert (first.code, second.code) == (1, 2)
    assert first.err == (
        "error: rank 1: its options differ from those of rank 0: --num-frames 9 and 17 (rank 0 "
        "and "
        "this rank); give all ranks the same.\n"
    )
    assert not (tmp_path / "a.mp4").exists()


def test_a_wrong_argument_is_told_once(words, tmp_path):
    first, second = launch([*words, "--prompt=a", "--fps=0"], 2, tmp_path)
    assert first.code == 2
    assert first.err == "error: --fps must lie between 1 and 240, got 0; use 24.\n"
    assert second.err == ""


@pytest.mark.usefixtures("prompts")
def test_ranks_that_speak_tell_an_error_once(words, generate, tmp_path):
    asked = ["--prompts-file=p.txt", "--output=v"]
    assert generate(*asked, "--dense")[0] == 0
    first, second = launch([*words, *asked, *SPARSE], 2, tmp_path)
    assert second.err == ""
    assert first.err.count("error: ") == 1
    assert "error: 'v' holds a run with other settings" in first.err


def rank_zero_is_late(rank):
    module = sys.modules["xattn_video.cli.generate"]
    check = module.check_parallel

    def check_late(*given):
        time.sleep(1)
        check(*given)

    if rank == 0:
        module.check_parallel = check_late


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (["--prompt=a", "--parallel=no"], "--parallel must be one of auto, ulysses, cfg, prompts"),
        (["--prompt=a", "--parallel=prompts"], "--parallel prompts needs --prompts-file"),
        (["--prompts-file=empty.txt"], "the prompts file 'empty.txt' contains no prompt"),
    ],
    ids=str,
)
def test_what_all_ranks_refuse_is_said_by_the_first(asked, message, words, tmp_path):
    (tmp_path / "empty.txt").touch()
    first, second = launch([*words, *asked, "--output=v"], 2, tmp_path, rank_zero_is_late)
    assert first.err.startswith(f"error: {message}")
    assert (first.err.count("\n"), second.err) == (1, "")


def rank_one_refuses(rank):
    def refuse(load, requests, force, prompts):
        raise ValueError("the memory is too small.")

    if rank == 1:
        generate_job.check_runs = refuse


@pytest.mark.usefixtures("prompts")
def test_a_folder_is_not_claimed_where_one_rank_refuses(words, tmp_path):
    asked = [*words, "--dense", "--prompts-file=p.txt", "--parallel=prompts", "--output=v"]
    first, second = launch(asked, 2, tmp_path, rank_one_refuses)
    assert first.err == "error: rank 1: the memory is too small.\n"
    assert second.err == ""
    assert not (tmp_path / "v").exists()


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_halves_of_the_ranks_compute_one_pass_each(num_ranks, words, generate, tmp_path):
    asked = ["--prompt=a", *SPARSE, "--true-cfg-scale=2", "--report=run.json"]
    assert generate(*asked, "--output=alone.mp4")[0] == 0
    (alone,) = json.loads((tmp_path / "run.json").read_text())["runs"]
    first, *others = launch([*words, *asked, "--output=both.mp4"], num_ranks, tmp_path)
    assert [first.code, *(other.code for other in others)] == [0] * num_ranks, first.err
    assert (tmp_path / "both.mp4").read_bytes() == (tmp_path / "alone.mp4").read_bytes()
    (both,) = json.loads((tmp_path / "run.json").read_text())["runs"]
    assert without_balance(both["report"]) == without_balance(alone["report"])
    assert [s["density"] for s in both["steps"]] == [s["density"] for s in alone["steps"]]


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_launcher_makes_the_demo_models_video_of_one_process(launcher, tmp_path):
    words = ["-m", "xattn_video.cli", "generate", "--model=demo", "--prompt=a red circle"]
    words += ["--device=cpu", "--dtype=float32", "--height=64", "--width=64", "--num-frames=17"]
    words += ["--num-inference-steps=4", *SPARSE]
    ways = {"alone": [], "both": ["-m", *LAUNCHERS[launcher]]}
    for name, way in ways.items():
        subprocess.run(
            [sys.executable, *way, *words, f"--output={name}.mp4"],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            check=True,
        )
    assert (tmp_path / "both.mp4").read_bytes() == (tmp_path / "alone.mp4").read_bytes()
