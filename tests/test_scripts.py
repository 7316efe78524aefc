"""Benchmarks and scripts: what fails is one line, and what cannot be written is found first."""

import ast
import importlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import imageio.v3 as imageio
import numpy as np
import pytest
from full_disk import KINDS, no_room, small_disk

from xattn_video.errors import FileNotWrittenError
from xattn_video.reporting.endings import run_script

ROOT = Path(__file__).parents[1]
# Mutants of the package are run in copies of its process, so that it may load nothing of it.
ALONE = {"mutation_run.py"}
SCRIPTS = [
    path
    for part in ("benchmarks", "scripts")
    for path in sorted((ROOT / part).glob("*.py"))
    if "__main__" in path.read_text() and path.name not in ALONE
]


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_every_script_runs_its_main_so_that_errors_are_one_line(path):
    last = ast.parse(path.read_text()).body[-1]
    assert isinstance(last, ast.If)
    assert ast.unparse(last.body[-1]) == "run_script(main)"


def ended(main, capsys):
    """Exit code and stderr."""
    with pytest.raises(SystemExit) as caught:
        run_script(main)
    return caught.value.code, capsys.readouterr().err


@pytest.mark.parametrize(
    "error", [FileNotWrittenError(Path("a"), "full"), OSError("full"), ValueError("x must be 1")]
)
def test_what_a_user_can_mend_is_one_line(error, capsys):
    def main():
        raise error

    assert ended(main, capsys) == (1, f"error: {error}\n")


def test_a_bug_keeps_its_traceback(capsys):
    def main():
        raise KeyError("a")

    code, err = ended(main, capsys)
    assert code == 1
    assert err.startswith("Traceback")
    assert err.endswith("error: KeyError: 'a'\n")


@pytest.mark.parametrize("code", [None, 0, 3])
def test_the_exit_code_is_that_of_main(code, capsys):
    assert ended(lambda: code, capsys) == (code or 0, "")


@pytest.mark.skipif(sys.platform == "win32", reason="signals are another thing there")
def test_sigterm_ends_a_script_in_one_line(capsys):
    def main():
        os.kill(os.getpid(), signal.SIGTERM)

    assert ended(main, capsys) == (143, "interrupted by SIGTERM.\n")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "name", ["attention", "accelerations", "residual_age", "demo_inputs", "check_demo_model"]
)
def test_a_full_disk_is_found_before_anything_is_measured(kind, name, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    part = "scripts" if name == "check_demo_model" else "benchmarks"
    module = importlib.import_module(f"{part}.{name}")
    suffix = ".safetensors" if name == "demo_inputs" else ".json"
    for loader in ("load_demo_pipeline", "measure_cases"):
        monkeypatch.setattr(module, loader, None, raising=False)
    with small_disk(kind, tmp_path / "disk") as folder:
        output = folder / f"a{suffix}"
        words = ["--device=cpu", f"--output={output}"]
        words += ["--dense"] * (name == "check_demo_model")
        monkeypatch.setattr(sys, "argv", [name, *words])
        with no_room(kind, folder), pytest.raises(ValueError, match="free space there"):
            module.main()
        assert list(folder.iterdir()) == []


@pytest.mark.parametrize(
    "command",
    ["demo.sh", "demo.sh --paper", "ruler.sh", "ruler.sh --paper", "longbench.sh", "vllms.sh"],
)
def test_the_help_of_a_shell_script_names_the_options_that_it_passes(command, tmp_path):
    name, *first = command.split()
    stub = tmp_path / "python"
    stub.write_text("#!/bin/sh\nshift 2\necho $*\n")
    stub.chmod(0o755)

    def printed(*words):
        words = ["bash", ROOT / f"scripts/run_{name}", *first, *words]
        path = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
        done = subprocess.run(words, env=path, capture_output=True, text=True, check=True)
        return done.stdout.replace("prefill ", "")

    passed = printed("--run", "runs/help").removesuffix(" --run runs/help\n")
    for word in ("--help", "-h"):
        told = f"Options of this script, instead of the defaults below: {passed}\n"
        assert printed(word) == f"{told}{passed} {word}\n"


@pytest.fixture
def sheet(tmp_path):
    """Run draw_contact_sheet; the words are those of its command line."""
    clip = tmp_path / "a.mp4"
    imageio.imwrite(clip, np.random.default_rng(0).integers(0, 256, (9, 64, 64, 3), "uint8"))

    def run(*words, start=("scripts/draw_contact_sheet.py",)):
        done = subprocess.run(
            [sys.executable, *start, *map(str, words)],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
        )
        return done.returncode, done.stderr

    run.clip = clip
    return run


def test_a_contact_sheet_on_a_full_disk_is_one_line_and_the_old_one_stays(sheet, tmp_path):
    with small_disk("full disk", tmp_path / "disk") as folder:
        path = folder / "s.png"
        path.write_text("old")
        with no_room("full disk", folder):
            code, err = sheet(sheet.clip, "--output", path)
        assert code == 1
        assert len(err.splitlines()) == 1
        assert "No space left on device; free space there" in err
        assert path.read_text() == "old"
        assert list(folder.iterdir()) == [path]


@pytest.mark.parametrize(
    "start", [("scripts/draw_contact_sheet.py",), ("-m", "scripts.draw_contact_sheet")]
)
def test_a_contact_sheet_is_drawn_however_its_script_is_started(start, sheet, tmp_path):
    code, err = sheet(sheet.clip, "--output", tmp_path / "new/s.png", start=start)
    assert code == 0, err
    assert imageio.imread(tmp_path / "new/s.png").shape == (115, 920, 3)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["a.mp4", "--output=s.foo"], "output must end in .png"),
        (["gone.mp4", "--output=s.png"], "gone.mp4"),
        (["a.mp4", "wide.mp4", "--output=s.png"], "all videos must be of one size, got 64x64"),
    ],
)
def test_what_no_contact_sheet_can_be_drawn_of_is_one_line(words, message, sheet, tmp_path):
    imageio.imwrite(tmp_path / "wide.mp4", np.zeros((5, 32, 64, 3), "uint8"))
    words = [word if "--" in word else tmp_path / word for word in words]
    code, err = sheet(*(str(word).replace("=", f"={tmp_path}/") for word in words))
    assert code == 1
    assert message in err.splitlines()[-1]
    assert "Traceback" not in err
