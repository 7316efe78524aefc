"""From generation to the final table: separate processes, killed in the middle and resumed."""

import contextlib
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from fake_vbench import install_fake_vbench
from vbench_runs import SMALL, SPARSE, files_of, invoke

from benchmarks.whole_videos import read_whole_videos
from eval_vbench import generate, report, score
from eval_vbench.prompts import load_suite

ROOT = Path(__file__).parents[1]
PYTHON = [sys.executable, "-m"]
# After -- the launcher does not take --run for its own --run-path.
TWO_PROCESSES = [
    *PYTHON,
    "torch.distributed.run",
    "--standalone",
    "--nproc-per-node=2",
    "-m",
    "--",
]
DEMO = [
    "--model=demo",
    "--height=128",
    "--width=128",
    "--num-frames=17",
    "--num-inference-steps=6",
    "--device=cpu",
    "--dtype=float32",
]
DEMO_SPARSE = ["--block-size=64", "--min-tokens=0", "--warmup-steps=2"]
SECONDS = 600


def start(launcher, folder, arguments):
    """`eval_vbench.generate` in processes of their own."""
    return subprocess.Popen(
        [*launcher, "eval_vbench.generate", f"--run={folder}", *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(launcher, folder, arguments):
    """Let it run to its end."""
    process = start(launcher, folder, arguments)
    output, _ = process.communicate(timeout=SECONDS)
    assert process.returncode == 0, output
    return output


def kill_after_first_video(launcher, folder, arguments):
    """End all of its processes as soon as one video is done and another begun."""
    process = start(launcher, folder, arguments)
    deadline = time.monotonic() + SECONDS
    while not list(folder.glob("items/*.json")):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.02)
    launched = psutil.Process(process.pid)
    # The launcher first, so that it cannot start others.
    for each in (launched, *launched.children(recursive=True)):
        with contextlib.suppress(psutil.NoSuchProcess):
            each.kill()
    process.communicate()


def make_report(folder, *names):
    """The report's values, and its page."""
    sparse = [f"--sparse={folder / name}" for name in names]
    code, page, messages = invoke(
        report.app, f"--dense={folder / 'dense'}", *sparse, f"--output={folder / 'report'}"
    )
    assert code == 0, messages
    return json.loads((folder / "report/report.json").read_text()), page


def test_the_whole_chain(tiny_pipeline, tmp_path, monkeypatch):
    common = [f"--model={tiny_pipeline}", "--num-prompts=3", *SMALL]
    runs = {
        "dense": [*common, "--dense"],
        "xattn-0.8": [*common, *SPARSE],
        "xattn-0.5": [*common, *SPARSE, "--threshold=0.5"],
    }
    kill_after_first_video(PYTHON, tmp_path / "dense", runs["dense"])
    assert len(list((tmp_path / "dense/items").iterdir())) < 3
    for name, arguments in runs.items():
        code, _, messages = invoke(generate.app, f"--run={tmp_path / name}", *arguments)
        assert code == 0, messages
        assert len(list((tmp_path / name / "videos").iterdir())) == 3
    install_fake_vbench(tmp_path / "packages")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "packages"))
    for name in runs:
        code, _, messages = invoke(
            score.app,
            f"--run={tmp_path / name}",
            f"--vbench-python={sys.executable}",
            f"--weights={tmp_path}",
            "--skip-missing",
        )
        assert code == 0, messages
    values, page = make_report(tmp_path, "xattn-0.8", "xattn-0.5")
    first, second = (entry["measures"] for entry in values["sparse"])
    assert first["density"] > second["density"]
    assert first["psnr"] > second["psnr"]
    assert "| temporal_flickering | 3 |" in page


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [PYTHON, TWO_PROCESSES], ids=["1", "2"])
def test_the_whole_chain_on_the_demo_model(launcher, tmp_path, vbench_python):
    common = [*DEMO, "--num-prompts=4"]
    runs = {
        "dense": [*common, "--dense"],
        "xattn-0.9": [*common, *DEMO_SPARSE, "--threshold=0.9"],
        "xattn-0.6": [*common, *DEMO_SPARSE, "--threshold=0.6"],
    }
    for name, arguments in runs.items():
        kill_after_first_video(launcher, tmp_path / name, arguments)
        assert len(list((tmp_path / name / "items").iterdir())) < 4
        finish(launcher, tmp_path / name, arguments)
        assert len(list((tmp_path / name / "videos").iterdir())) == 4
        assert not list((tmp_path / name / "unfinished").rglob("*.m*"))
    # The other number of processes finds nothing to do and makes the same videos anew.
    other = TWO_PROCESSES if launcher is PYTHON else PYTHON
    before = files_of(tmp_path / "xattn-0.9")
    finish(other, tmp_path / "xattn-0.9", runs["xattn-0.9"])
    assert files_of(tmp_path / "xattn-0.9") == before
    finish(other, tmp_path / "again", runs["xattn-0.9"])
    assert files_of(tmp_path / "again") == before
    for name in runs:
        code, _, messages = invoke(
            score.app,
            f"--run={tmp_path / name}",
            f"--vbench-python={vbench_python}",
            f"--weights={tmp_path / 'none'}",
            "--device=cpu",
            "--skip-missing",
        )
        assert code == 0, messages
    values, page = make_report(tmp_path, "xattn-0.9", "xattn-0.6")
    first, second = values["sparse"]
    assert first["measures"]["psnr"] > second["measures"]["psnr"]
    assert first["measures"]["density"] > second["measures"]["density"]
    assert first["checks"].keys() == values["dense"]["checks"].keys()
    assert 0.5 < first["dimensions"][0]["dense"] <= 1
    assert "Not comparable to the VBench leaderboard" in page


def run_script(*arguments):
    """`scripts/run_hunyuan.sh`."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(
        [ROOT / "scripts/run_hunyuan.sh", *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, "PATH": path, "PYTHONPATH": str(ROOT)},
        check=False,
    )


def test_the_cost_is_printed_first(tmp_path):
    """From the seconds of a step, and of what is not denoising, that were measured."""
    measured = json.loads((ROOT / "benchmarks/results/step-h100.json").read_text())["rows"]
    dense, low, high = (
        row["latency_ms"] / 1000 for row in measured if row["phase"] in ("dense", "sparse")
    )
    sparse_video = next(video for video in read_whole_videos() if video.density is not None)
    other = sparse_video.other_seconds
    videos = [int(5 * dense + 45 * step + other) for step in (dense, high, low)]
    done = run_script("--plan", "--gpus", 8, tmp_path / "runs")
    assert done.returncode == 0
    assert "944 videos x 3 runs" in done.stdout
    seconds = [int(number) for number in re.findall(r"(\d+) s (?:for|at)", done.stdout)]
    assert seconds == pytest.approx(videos, abs=2)
    assert "about 578 GPU hours, 72 hours on 8 GPU(s)" in done.stdout
    assert "about 453 GiB" in done.stdout
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "error: give a folder for the runs\n"),
        (["a", "b"], "error: give one folder for the runs, got a and b\n"),
        (["--tau", "0.9"], "error: unknown option --tau\n"),
        (["--gpus", "0", "runs"], "error: not a positive number: 0\n"),
        (["--num-prompts", "all", "runs"], "error: not a positive number: all\n"),
        (
            ["--plan", "--num-prompts", "945", "runs"],
            "error: the suite has 944 prompts, got 945\n",
        ),
        (
            ["--plan", "runs", "--", "--suite=demo", "--num-prompts", "41"],
            "error: the suite has 40 prompts, got 41\n",
        ),
    ],
)
def test_the_script_refuses_what_it_does_not_know(arguments, message):
    done = run_script(*arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert "xattn-run-hunyuan, or in a clone scripts/run_hunyuan.sh:" in done.stderr


def test_the_script_has_a_help_and_says_what_its_plan_leaves_out(tmp_path):
    done = run_script("--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert "xattn-run-hunyuan, or in a clone scripts/run_hunyuan.sh:" in done.stdout
    plan = ("--plan", tmp_path / "runs")
    left_out = "not of all options after --"
    assert left_out not in run_script(*plan, "--", "--suite", "original").stdout
    assert left_out in run_script(*plan, "--", "--suite=demo", "--num-inference-steps=10").stdout


@pytest.mark.parametrize(
    ("words", "videos"),
    [
        (["--suite", "demo"], len(load_suite("demo"))),
        (["--suite=hunyuan"], len(load_suite("hunyuan"))),
        (["--num-prompts", "3", "--videos-per-prompt=5"], 15),
        (["--suite=demo", "--num-prompts=2"], 2),
    ],
)
def test_the_plan_counts_the_videos_of_the_options_after_the_dashes(words, videos, tmp_path):
    done = run_script("--plan", tmp_path / "runs", "--", *words)
    assert done.stdout.startswith(f"expected   {videos} videos x 3 runs; ")
    assert f"about {videos * 3 * 16 // 100} GiB" in done.stdout


@pytest.mark.slow
def test_the_script_runs_start_to_finish(tiny_pipeline, tmp_path):
    # The options after -- make the paper's run a small one.
    small = [*SMALL, "--suite=gpt_enhanced", "--block-size=16", "--min-tokens=0"]
    command = ("--num-prompts", 2, tmp_path, "--", f"--model={tiny_pipeline}", *small)
    done = run_script(*command)
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "report/report.md").read_text()
    assert "| 0.90 | 21.5 | - |" in page
    assert "2 of 944 prompts" in page
    again = run_script(*command)
    assert again.returncode == 0
    assert "2 of 2 videos already exist" in again.stderr
