"""How a run of `xattn-video generate` ends early, and what it leaves."""

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import SMALL, SPARSE

ROOT = Path(__file__).parents[1]


@pytest.fixture
def stop_at_the_second(monkeypatch):
    """What makes the generation of the prompt "second" raise."""
    from xattn_video.pipelines import generation

    real = generation.generate

    def stop(error):
        def generate_or_stop(pipe, request, progress):
            if request.prompt == "second":
                raise error
            return real(pipe, request, progress)

        monkeypatch.setattr(generation, "generate", generate_or_stop)

    return stop


def test_a_run_cut_short_leaves_the_report_of_what_it_did(generate, stop_at_the_second, tmp_path):
    stop_at_the_second(RuntimeError("CUDA out of memory"))
    (tmp_path / "p.txt").write_text("first\nsecond\n")
    code, _, err = generate("--prompts-file=p.txt", "--dense", "--report=run.json")
    assert code == 1
    assert "failed: second-seed0.mp4: RuntimeError: CUDA out of memory" in err
    (video,) = json.loads((tmp_path / "run.json").read_text())["runs"]
    assert (tmp_path / video["file"]).is_file()


def test_an_interruption_says_how_many_videos_are_written(generate, stop_at_the_second, tmp_path):
    stop_at_the_second(KeyboardInterrupt())
    (tmp_path / "p.txt").write_text("first\nsecond\nthird\n")
    code, _, err = generate("--prompts-file=p.txt", "--dense", "--report=run.json")
    assert code == 130
    assert err.splitlines()[-1] == "interrupted; 1 of 3 videos are written."
    (video,) = json.loads((tmp_path / "run.json").read_text())["runs"]
    assert [tmp_path / video["file"]] == list((tmp_path / "videos").glob("*.mp4"))


def test_an_interruption_of_a_plot_counts_the_video(generate, monkeypatch, tmp_path):
    from xattn_video import SparsityReport

    def interrupt(report, path):
        raise KeyboardInterrupt

    monkeypatch.setattr(SparsityReport, "plot", interrupt)
    code, _, err = generate("--prompt=a", *SPARSE, "--output=a.mp4", "--plot=a.png")
    assert code == 130
    assert err.splitlines()[-1] == "interrupted; 1 of 1 videos are written."
    assert [path.name for path in tmp_path.iterdir()] == ["a.mp4"]


def test_an_interruption_counts_the_videos_of_other_ranks(
    generate, stop_at_the_second, monkeypatch, tmp_path
):
    from xattn_video.cli import generate_job

    real = generate_job._finished

    def with_another(job):
        return real(job) | {2: {}}

    stop_at_the_second(KeyboardInterrupt())
    (tmp_path / "p.txt").write_text("first\nsecond\nthird\n")
    monkeypatch.setattr(
        generate_job,
        "_find_missing",
        lambda *_: monkeypatch.setattr(generate_job, "_finished", with_another) or [0, 1, 2],
    )
    code, _, err = generate("--prompts-file=p.txt", "--dense")
    assert code == 130
    assert err.splitlines()[-1] == "interrupted; 2 of 3 videos are written."


def test_results_that_cannot_be_printed_end_a_run_and_lose_no_video(
    generate, monkeypatch, tmp_path
):
    from xattn_video.cli import generate_job

    def fail(*_):
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    (tmp_path / "p.txt").write_text("first\nsecond\n")
    with monkeypatch.context() as broken:
        broken.setattr(generate_job, "print_summary", fail)
        code, _, err = generate("--prompts-file=p.txt", "--dense")
    assert code == 1
    assert "failed" not in err
    assert len(list((tmp_path / "videos").glob("*.mp4"))) == 1
    code, out, _ = generate("--prompts-file=p.txt", "--dense")
    assert code == 0
    assert out.count("video ") == 1


@pytest.mark.skipif(sys.platform == "win32", reason="Ctrl-C is another thing there")
def test_ctrl_c_leaves_no_part_of_a_video(tiny_pipeline, tmp_path):
    """In the middle of a run of many steps, once it has shown the first tenth of them."""
    command = [sys.executable, "-m", "xattn_video", "generate", "--model", str(tiny_pipeline)]
    options = ["--num-inference-steps=1000", "--dense", f"--output={tmp_path / 'a.mp4'}"]
    process = subprocess.Popen(
        [*command, *SMALL, *options, "--prompt=a"],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        # Where the tests run in the background of a shell the signal would be ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    lines = []
    for line in process.stderr:
        lines.append(line)
        if "step 100/1000" in line:
            process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 130, lines
    assert lines[-1] == "interrupted; 0 of 1 videos are written.\n"
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_fails_exits_with_code_1(generate, monkeypatch, tmp_path):
    from xattn_video.pipelines import generation

    def fail(*arguments):
        raise RuntimeError("CUDA out of memory.\nTried to allocate")

    monkeypatch.setattr(generation, "generate", fail)
    code, _, err = generate("--prompt=a", "--dense")
    assert code == 1
    assert err.splitlines()[-1] == "error: CUDA out of memory. Tried to allocate"
    assert "Traceback" not in err
    assert list(tmp_path.iterdir()) == []
    code, _, err = generate("--prompt=a", "--dense", "--verbose")
    assert code == 1
    assert "Traceback" in err
