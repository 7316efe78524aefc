"""Full disks, folders in the way and SIGKILL while videos are scored; VBench is a stand-in."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from full_disk import KINDS, no_room, small_disk
from vbench_runs import invoke

from eval_vbench import score

ROOT = Path(__file__).parents[1]
FLICKER = "--dimensions=temporal_flickering"


@pytest.fixture
def own(tmp_path):
    """A folder with what the stand-in takes for a video."""
    folder = tmp_path / "own"
    folder.mkdir()
    (folder / "a.mp4").write_text("x")
    return folder


def score_own(folder, *arguments):
    """Exit code, stdout, stderr."""
    python = f"--vbench-python={sys.executable}"
    return invoke(score.app, f"--videos={folder}", python, *arguments)


@pytest.mark.parametrize("kind", KINDS)
def test_a_full_disk_is_found_before_anything_is_scored(kind, fake_vbench, tmp_path, monkeypatch):
    monkeypatch.setenv("FAKE_VBENCH", "raise")
    with small_disk(kind, tmp_path / "disk") as folder:
        (folder / "a.mp4").write_text("x")
        with no_room(kind, folder):
            code, _, err = score_own(folder, FLICKER)
        assert code == 2
        assert f"error: scores cannot be written to {str(folder / 'vbench')!r}: " in err
        assert "; free space there, or use another." in err
        assert list((folder / "vbench").iterdir()) == []
        monkeypatch.delenv("FAKE_VBENCH")
        assert score_own(folder, FLICKER)[0] == 0


def test_a_disk_that_fills_up_meanwhile_is_named(fake_vbench, tmp_path, monkeypatch):
    monkeypatch.setenv("FAKE_VBENCH", "full disk")
    with small_disk("full disk", tmp_path / "disk") as folder:
        (folder / "a.mp4").write_text("x")
        code, _, err = score_own(folder, FLICKER)
        assert code == 1
        assert err.splitlines()[-1] == (
            f"error: scores cannot be written to {str(folder / 'vbench')!r}: No space left on "
            "device; free space there, or use another."
        )


def test_what_lies_in_the_way_of_the_scores_is_named(own, fake_vbench):
    (own / "vbench").touch()
    code, _, err = score_own(own, FLICKER)
    assert code == 2
    assert f"{str(own / 'vbench')!r} is a file, not a folder" in err


def test_a_score_that_is_no_text_is_named(own, fake_vbench):
    (own / "vbench").mkdir()
    (own / "vbench/temporal_flickering.json").write_bytes(b"\xff")
    code, _, err = score_own(own, FLICKER)
    assert code == 2
    assert "temporal_flickering.json is not what eval_vbench.score writes" in err


@pytest.mark.skipif(sys.platform == "win32", reason="signals are another thing there")
def test_vbench_ends_with_the_command_that_was_killed(own, fake_vbench, tmp_path):
    temporary, started = tmp_path / "temporary", tmp_path / "started"
    temporary.mkdir()
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\nPYTHONPATH={fake_vbench} exec {sys.executable} $*\n")
    python.chmod(0o755)
    asked = {"FAKE_VBENCH": "waits", "FAKE_VBENCH_STARTED": str(started)}
    words = [f"--videos={own}", f"--vbench-python={python}", FLICKER]
    command = subprocess.Popen(
        [sys.executable, "-m", "eval_vbench.score", *words],
        env={**os.environ, **asked, "TMPDIR": str(temporary), "PYTHONPATH": str(ROOT)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        _wait_until(lambda: started.is_file() and started.read_text())
        assert list(temporary.iterdir())
    finally:
        command.kill()
        command.wait()
    _wait_until(lambda: not list(temporary.iterdir()))
    _wait_until(lambda: not Path(f"/proc/{started.read_text()}/cmdline").is_file())


def _wait_until(done):
    ends = time.monotonic() + 60
    while not done():
        assert time.monotonic() < ends
        time.sleep(0.1)
