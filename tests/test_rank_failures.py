"""A rank that fails ends all of them, with one line that names it and nothing half-written."""

import os
import signal
import subprocess
import sys
import threading
import time

import psutil
import pytest
from command_line import SMALL
from launched import LAUNCHERS, ROOT, launch

from xattn_video.pipelines import generation, rank_watch


def at_step_two(act):
    real = generation._StepRecorder.step_ends

    def step_ends(recorder, pipe, index, timestep, tensors):
        if index == 1:
            act()
        return real(recorder, pipe, index, timestep, tensors)

    generation._StepRecorder.step_ends = step_ends


def run_out_of_memory():
    raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def kill():
    os.kill(os.getpid(), signal.SIGKILL)


def pause():
    os.kill(os.getpid(), signal.SIGSTOP)


def hang():
    time.sleep(600)


def be_impatient():
    rank_watch.PATIENCE_SECONDS, rank_watch.SUSPICION_SECONDS = 2.0, 1.5


def rank_one_raises(rank):
    if rank == 1:
        at_step_two(run_out_of_memory)


def rank_one_is_killed(rank):
    be_impatient()
    if rank == 1:
        at_step_two(kill)


def rank_one_is_killed_later(rank):
    be_impatient()
    real = generation.generate

    def generate(pipe, request, progress):
        if rank == 1 and request.prompt == "second":
            at_step_two(kill)
        return real(pipe, request, progress)

    generation.generate = generate


def rank_zero_is_killed(rank):
    be_impatient()
    if rank == 0:
        at_step_two(kill)


def rank_one_hangs(rank):
    be_impatient()
    if rank == 1:
        at_step_two(hang)


def wait_for_a_gpu():
    """As CUDA does: the main thread heeds no signal of the launcher, which has seen one end."""
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    threading.Timer(1, os.kill, (os.getpid(), signal.SIGTERM)).start()
    time.sleep(600)


def rank_one_is_killed_and_rank_zero_waits(rank):
    rank_watch.SUSPICION_SECONDS = 1.5
    at_step_two(kill if rank == 1 else wait_for_a_gpu)


def interrupt_all(rank):
    """As a launcher that is stopped: one rank heeds the signal, one waits for the other."""

    def be_ended():
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(600)

    at_step_two(be_ended if rank == 1 else wait_for_a_gpu)


def rank_one_is_stopped(rank):
    be_impatient()
    if rank == 1:
        at_step_two(pause)


ENDS = {
    rank_one_raises: ("error: rank 1: CUDA out of memory. Tried to allocate 2.00 GiB.", 0),
    rank_one_is_killed: ("error: rank 1: it ended without a message; it was killed or", 0),
    rank_one_is_killed_and_rank_zero_waits: ("error: rank 1: it ended without a message", 0),
    interrupt_all: ("error: all ranks were interrupted by SIGTERM", 0),
    rank_zero_is_killed: ("error: rank 0: it ended without a message", 1),
    rank_one_is_stopped: ("error: rank 1: it has not answered for 2 s", 0),
    rank_one_hangs: ("error: rank 1: it has made no progress for", 0),
}


@pytest.mark.parametrize("sabotage", ENDS, ids=lambda sabotage: sabotage.__name__)
def test_one_line_names_the_rank_and_all_end(sabotage, tiny_pipeline, tmp_path):
    line, teller = ENDS[sabotage]
    words = ["generate", "--model", tiny_pipeline, *SMALL, "--prompt=a", "--output=a.mp4"]
    ended = launch(words, 2, tmp_path, sabotage)
    lines = [text for text in ended[teller].err.splitlines() if text.startswith("error: ")]
    assert len(lines) == 1
    assert lines[0].startswith(line)
    assert ended[teller].code == 1
    # A stopped process cannot end itself.
    assert ended[1 - teller].code is not None
    assert {path.name for path in tmp_path.iterdir()} == {"logs"}


def test_a_killed_rank_costs_no_finished_video(tiny_pipeline, tmp_path):
    (tmp_path / "p.txt").write_text("first\nsecond\nthird\n")
    words = ["generate", "--model", tiny_pipeline, *SMALL, "--dense", "--prompts-file=p.txt"]
    ended = launch([*words, "--parallel=ulysses"], 2, tmp_path, rank_one_is_killed_later)
    assert ended[0].code == 1
    assert {path.name for path in (tmp_path / "videos").glob("*.mp4")} == {"first-seed0.mp4"}
    ended = launch([*words, "--parallel=prompts"], 2, tmp_path)
    assert [end.code for end in ended] == [0, 0], ended[0].err
    assert ended[0].err.count(" exists already\n") == 1
    assert len(list((tmp_path / "videos").glob("*.mp4"))) == 3


def test_a_rank_killed_among_dealt_prompts_costs_no_finished_video(tiny_pipeline, tmp_path):
    (tmp_path / "p.txt").write_text("first\nsecond\nthird\n")
    words = ["generate", "--model", tiny_pipeline, *SMALL, "--dense", "--prompts-file=p.txt"]
    words.append("--parallel=prompts")
    ended = launch(words, 2, tmp_path, rank_one_is_killed)
    assert ended[0].code == 1
    assert ended[0].err.count("error: rank 1: it ") == 1, ended[0].err
    made = {path: path.read_bytes() for path in (tmp_path / "videos").glob("*.mp4")}
    assert made
    ended = launch(words, 2, tmp_path)
    assert [end.code for end in ended] == [0, 0], ended[0].err
    assert ended[0].err.count(" exists already\n") == len(made)
    assert len(list((tmp_path / "videos").glob("*.mp4"))) == 3
    assert all(path.read_bytes() == content for path, content in made.items())


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_under_a_launcher_a_killed_rank_is_named(launcher, tmp_path):
    words = ["generate", "--model=demo", "--prompt=a red circle", "--device=cpu", "--height=64"]
    words += ["--width=64", "--num-frames=17", "--num-inference-steps=600", "--output=a.mp4"]
    err = tmp_path / "err"
    with err.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", *LAUNCHERS[launcher], "-m", "xattn_video.cli", *words],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=file,
            stderr=file,
        )
    ends = time.monotonic() + 100
    while "step 60/600" not in err.read_text() and time.monotonic() < ends:
        time.sleep(0.1)
    for child in psutil.Process(process.pid).children(recursive=True):
        if child.environ().get("RANK") == "1":
            child.kill()
            break
    assert process.wait(60) == 1
    line = "error: rank 1: it ended without a message; it was killed or ran out of host memory"
    assert err.read_text().splitlines().count(line) == 1, err.read_text()
    assert not (tmp_path / "a.mp4").exists()
