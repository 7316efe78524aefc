"""Signals, full disks and broken encoders, tried on every command that writes."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import imageio.v3 as imageio
import pytest
from command_line import SMALL, run_cli
from fake_ffmpeg import FAULTS, install
from full_disk import KINDS, no_room, small_disk
from vbench_runs import SMALL as VBENCH_SMALL
from vbench_runs import invoke, make_run

from eval_vbench import generate as vbench_generate
from eval_vbench import report as vbench_report
from eval_vbench import score as vbench_score

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="signals are another thing there")

# An encoder that writes a part of the file and then nothing more.
WAITS = "echo part >$out; exec sleep 600"


def command(name: str, model: Path, folder: Path) -> list[str]:
    """A run that writes a video into ``folder``."""
    cli = ["xattn_video", name, "--model", str(model), *SMALL, "--prompt=a"]
    words = {
        "generate": [*cli, "--dense", f"--output={folder / 'v.mkv'}"],
        "generate mp4": [*cli, "--dense", f"--output={folder / 'v.mp4'}"],
        "compare": [*cli, f"--output={folder}"],
        "eval_vbench": [
            *("eval_vbench.generate", f"--run={folder}", "--model", str(model)),
            *(*VBENCH_SMALL, "--num-prompts=1", "--dense"),
        ],
    }[name]
    return [sys.executable, "-m", *(word.removesuffix(" mp4") for word in words)]


def parts(folder: Path) -> list[Path]:
    """Temporary files that hold what `WAITS` wrote."""
    found = []
    for path in folder.rglob(".xattn-video-*.m*"):
        # That of the probe comes and goes.
        with contextlib.suppress(FileNotFoundError):
            if path.read_bytes() == b"part\n":
                found.append(path)
    return found


@pytest.fixture
def writing(tiny_pipeline, tmp_path, monkeypatch):
    """Start a command and return its process once it is in the middle of writing a video."""
    (tmp_path / "bin").mkdir()
    install(monkeypatch, tmp_path / "bin", WAITS)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    started = []

    def start(name: str, folder: Path) -> subprocess.Popen:
        folder.mkdir()
        process = subprocess.Popen(
            command(name, tiny_pipeline, folder), stderr=subprocess.PIPE, text=True
        )
        started.append(process)
        ends = time.monotonic() + 240
        while not parts(folder) and process.poll() is None and time.monotonic() < ends:
            time.sleep(0.05)
        assert parts(folder), process.stderr.read() if process.poll() is not None else "late"
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("name", ["generate", "generate mp4", "compare", "eval_vbench"])
def test_sigterm_ends_in_one_line_and_leaves_no_part_of_a_video(name, writing, tmp_path):
    folder = tmp_path / "out"
    process = writing(name, folder)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 143, err
    assert err.splitlines()[-1].startswith("interrupted by SIGTERM"), err
    assert "Traceback" not in err
    assert not list(folder.rglob(".*"))
    assert not [path for path in folder.rglob("*.m*") if path.is_file()]


def test_what_a_killed_run_left_is_cleared_by_the_next(
    writing, generate, tiny_pipeline, tmp_path, monkeypatch
):
    folder = tmp_path / "out"
    process = writing("generate", folder)
    process.kill()
    process.wait()
    (left,) = parts(folder)
    assert str(process.pid) in left.name
    monkeypatch.delenv("IMAGEIO_FFMPEG_EXE")
    code, _, err = generate("--prompt=a", "--dense", f"--output={folder / 'v.mkv'}")
    assert code == 0, err
    assert [path.name for path in folder.iterdir()] == ["v.mkv"]


def test_a_killed_run_of_the_benchmark_is_resumed_and_nothing_is_left(
    writing, tiny_pipeline, tmp_path, monkeypatch
):
    folder = tmp_path / "out"
    process = writing("eval_vbench", folder)
    process.kill()
    process.wait()
    assert parts(folder)
    monkeypatch.delenv("IMAGEIO_FFMPEG_EXE")
    code, _, err = make_run(folder, tiny_pipeline, "--dense", prompts=1)
    assert code == 0, err
    assert not list(folder.rglob(".*"))


def test_a_signal_that_a_library_swallows_is_said_again(monkeypatch):
    from xattn_video.reporting import endings

    def swallow(folder):
        with contextlib.suppress(BaseException):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(1)
        time.sleep(60)

    monkeypatch.setattr(endings, "_PATIENCE_SECONDS", 0.2)
    monkeypatch.setattr(vbench_score.RunVideos, "check", swallow)
    begun = time.monotonic()
    code, _, err = invoke(vbench_score.app, "--run=a")
    assert (code, err) == (143, "interrupted by SIGTERM.\n")
    assert time.monotonic() - begun < 30
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_every_command_ends_on_a_signal_with_its_code(number, monkeypatch, tmp_path):
    def send(*arguments, **options):
        os.kill(os.getpid(), number)
        raise AssertionError("the signal was not handled")

    monkeypatch.setattr(vbench_report, "load_run", send)
    monkeypatch.setattr(vbench_score.RunVideos, "check", send)
    monkeypatch.setattr(vbench_generate, "SamplingJob", send)
    monkeypatch.setattr("xattn_video.cli.outputs.Prompts.read", send)
    monkeypatch.setattr("xattn_video.cli.compare_options.compared_prompts", send)
    runs = {
        "report": lambda: invoke(vbench_report.app, "--dense=a", "--sparse=b"),
        "score": lambda: invoke(vbench_score.app, "--run=a"),
        "eval generate": lambda: invoke(vbench_generate.app, "--run=a", "--model=demo"),
        "generate": lambda: run_cli("generate", "--prompt=a"),
        "compare": lambda: run_cli("compare", "--prompt=a"),
        "calibrate": lambda: run_cli("calibrate", "--density=0.2", "--output=d.json"),
    }
    for name, run in runs.items():
        # Under nohup it is ignored, and stays so.
        signal.signal(number, signal.SIG_DFL)
        code, _, err = run()
        assert (code, err) == (128 + number, f"interrupted by {number.name}.\n"), name
        assert signal.getsignal(number) == signal.SIG_DFL


def test_a_signal_that_the_caller_ignores_stays_ignored(monkeypatch):
    monkeypatch.setattr(vbench_score.RunVideos, "check", lambda folder: os.kill(os.getpid(), 1))
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        code, _, err = invoke(vbench_score.app, "--run=gone")
    finally:
        signal.signal(signal.SIGHUP, before)
    assert code == 2
    assert "interrupted" not in err


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
@pytest.mark.parametrize("kind", KINDS)
def test_generate_on_a_full_disk_fails_and_leaves_the_old_video(
    kind, suffix, generate, tmp_path, monkeypatch
):
    from xattn_video.pipelines import video

    with small_disk(kind, tmp_path / "disk") as folder, contextlib.ExitStack() as full:
        # It fills up after the checks.
        monkeypatch.setattr(
            video, "check_encoders", lambda *_: full.enter_context(no_room(kind, folder))
        )
        path = folder / f"v{suffix}"
        path.write_text("old")
        code, out, err = generate("--prompt=a", "--dense", f"--output={path}")
        full.close()
        assert code == 1
        assert "replaced" not in out
        line = err.splitlines()[-1]
        assert line.startswith(f"error: cannot write {str(path)!r}: ")
        assert "The frames: " in line
        assert path.read_text() == "old"
        assert [file.name for file in folder.iterdir()] == [path.name]


@pytest.mark.usefixtures("no_model")
def test_a_disk_that_is_full_beforehand_is_found_before_the_model_is_loaded(generate, tmp_path):
    with small_disk("file size limit", tmp_path / "disk") as folder:
        with no_room("file size limit", folder):
            code, _, err = generate("--prompt=a", "--dense", f"--output={folder / 'v.mkv'}")
        assert code == 2
        assert "File too large; free space there" in err
        assert list(folder.iterdir()) == []


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize("name", ["generate", "generate mp4", "compare", "eval_vbench"])
@pytest.mark.parametrize("fault", ["missing", "not executable", "no encoder"])
def test_an_ffmpeg_that_cannot_encode_is_found_before_the_model_is_loaded(
    name, fault, tiny_pipeline, tmp_path, monkeypatch
):
    ffmpeg = tmp_path / "ffmpeg"
    if fault != "missing":
        ffmpeg.write_text(
            "#!/bin/sh\ncase $1 in -version) exit 0;; esac\necho Unknown encoder >&2; exit 8"
        )
    if fault == "no encoder":
        ffmpeg.chmod(0o755)
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", str(ffmpeg))
    _, _, module, *words = command(name, tiny_pipeline, tmp_path / "out")
    if module == "xattn_video":
        code, _, err = run_cli(*words)
    else:
        code, _, err = invoke(vbench_generate.app, *words)
    assert code == 2, err
    last = err.splitlines()[-1]
    assert "pip install" in last
    assert "Unknown encoder" in last or "videos need ffmpeg" in last
    assert not list((tmp_path / "out").rglob(".*"))


def test_compare_keeps_the_frames_of_a_video_that_it_cannot_write(
    tiny_pipeline, tmp_path, monkeypatch
):
    (tmp_path / "bin").mkdir()
    install(monkeypatch, tmp_path / "bin", FAULTS["killed"])
    _, _, _, *words = command("compare", tiny_pipeline, tmp_path / "out")
    code, _, err = run_cli(*words)
    assert code == 1
    (kept,) = (tmp_path / "out").rglob("*.npy")
    assert f"they are saved in {str(kept)!r}" in err


def test_paths_of_every_kind_are_expanded(generate, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("WHERE", str(tmp_path / "where"))
    (tmp_path / "home").mkdir()
    (tmp_path / "home/p.txt").write_text("a\n")
    (tmp_path / "home/s.json").write_text('{"points": [[0, 1.0]]}')
    code, _, err = generate(
        "--prompts-file=~/p.txt",
        "--schedule=$HOME/s.json",
        "--output=~/videos",
        "--report=$WHERE/run.json",
        "--plot=${WHERE}/plots",
    )
    assert code == 0, err
    (video,) = (tmp_path / "home/videos").glob("*.mp4")
    assert imageio.imread(video).shape == (9, 64, 64, 3)
    assert (tmp_path / "where/run.json").is_file()
    assert len(list((tmp_path / "where/plots").iterdir())) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["home", "where"]


def test_a_path_with_a_variable_that_is_not_set_is_refused(generate):
    code, _, err = generate("--prompt=a", "--output=$NOT_SET/a.mp4")
    assert code == 2
    assert "names $NOT_SET, which is not set" in err
    assert err.count("\n") == 1


def test_the_benchmarks_commands_expand_paths_too(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    for app, words in (
        (vbench_report.app, ["--dense=~/a", "--sparse=~/b"]),
        (vbench_score.app, ["--run=~/a"]),
    ):
        code, _, err = invoke(app, *words)
        assert code == 2
        assert str(tmp_path / "a") in err


def test_a_models_folder_is_expanded(tiny_pipeline, tmp_path, monkeypatch):
    from xattn_video.pipelines.source import find_model

    monkeypatch.setenv("MODELS", str(tiny_pipeline.parent))
    assert find_model(f"$MODELS/{tiny_pipeline.name}").folder == tiny_pipeline
