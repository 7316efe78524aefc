"""Files are written whole or not at all, by every writer; paths are expanded."""

import ast
import errno
import json
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from full_disk import KINDS, no_room, small_disk

from xattn_video import SparsityReport, ThresholdSchedule
from xattn_video.errors import FileNotWrittenError
from xattn_video.files import (
    atomic_path,
    check_output_folder,
    check_output_path,
    check_writable,
    temporary_path,
    user_path,
    write_figure,
    write_json,
    write_text,
)
from xattn_video.policy.report import ForwardRun, LayerRun

ROOT = Path(__file__).parents[1]
SOURCES = [
    path
    for part in ("xattn_video", "eval_vbench", "eval_language", "benchmarks", "scripts")
    for path in sorted((ROOT / part).rglob("*.py"))
]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def report() -> SparsityReport:
    return SparsityReport(
        layer_names=("a",),
        forwards=(
            ForwardRun(0, 0, 1000.0, 0.9, "triton", (LayerRun("sparse", kept=1, valid=2),)),
        ),
    )


def draw(path: Path) -> None:
    from matplotlib.figure import Figure

    write_figure(path, Figure())


def add_row(path: Path) -> None:
    from benchmarks.results_writer import ResultsWriter

    results = ResultsWriter(None, {})
    # The disk fills up after the check of the path.
    results._path = path
    results.add({"name": "x" * 100}, done=True)


def save_inputs(path: Path) -> None:
    from benchmarks.inputs_file import save_inputs

    save_inputs(path, {"a": tuple(torch.zeros(1, 4, 2, 8) for _ in range(3))}, 1)


def write_between(path: Path) -> None:
    from scripts.write_quality_page import write_between

    write_between(path, "o", "d", "x" * 100)


def save_sheet(path: Path) -> None:
    from demo_training.pictures import save_sheet

    save_sheet([torch.zeros(3, 8, 32, 32)], path)


def save_checkpoint(path: Path) -> None:
    from demo_training.weights import save_checkpoint

    save_checkpoint(path.parent, "a", {"x": torch.zeros(10)})


WRITERS: dict[str, Callable[[Path], Any]] = {
    "text.md": lambda path: write_text(path, "x" * 100),
    "json.json": lambda path: write_json(path, ["x"] * 100),
    "figure.png": draw,
    "report.json": lambda path: report().save(path),
    "report.png": lambda path: report().plot(path),
    "schedule.json": lambda path: ThresholdSchedule(((0, 0.9),)).save(path),
    "benchmark.json": add_row,
    "inputs.safetensors": save_inputs,
    "page.md": write_between,
    "sheet.png": save_sheet,
    "a.ckpt.0": save_checkpoint,
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", WRITERS)
def test_every_writer_fails_aloud_without_room_and_leaves_the_old_file(
    name, kind, tmp_path, monkeypatch
):
    for part in (ROOT, ROOT / "scripts"):
        monkeypatch.syspath_prepend(str(part))
    WRITERS[name](tmp_path / name) if name != "page.md" else None  # fonts and imports
    with small_disk(kind, tmp_path / "disk") as folder:
        path = folder / name
        path.write_text("old")
        with no_room(kind, folder), pytest.raises(OSError, match="cannot write") as caught:
            WRITERS[name](path)
        assert path.read_text() == "old"
        assert names(folder) == [name]
        assert caught.value.errno in (errno.ENOSPC, errno.EFBIG, None)
        WRITERS[name](path)
        assert path.read_bytes() != b"old"
        assert names(folder) == [name]


@pytest.mark.parametrize("check", [check_output_folder, check_writable])
def test_a_device_in_the_way_of_a_folder_is_named(check):
    with pytest.raises(ValueError, match="'/dev/null' is a file, not a folder; use another"):
        check(Path("/dev/null/videos"))


def test_a_check_creates_no_folder_and_a_writer_does(tmp_path):
    path = tmp_path / "new/folder/a.json"
    check_output_path(path, (".json",))
    assert names(tmp_path) == []
    write_json(path, {})
    assert names(path.parent) == ["a.json"]


@pytest.mark.parametrize("name", ["file/a.json", "file/new/a.json"])
def test_a_file_in_the_place_of_a_folder_is_a_failure_to_write(name, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(FileNotWrittenError, match="Not a directory; no part of it is left"):
        write_json(tmp_path / name, {}, new=True)


@pytest.mark.parametrize("name", ["n" * 300, f"new/{'n' * 300}/folder", "new/\0"])
def test_folders_that_cannot_have_their_name_are_refused(name, tmp_path):
    with pytest.raises(ValueError, match=r"output cannot be written to .*; use another"):
        check_writable(tmp_path / name)
    assert names(tmp_path) == []


def test_what_cannot_be_written_is_told_in_one_line(tmp_path):
    (tmp_path / "old.md").write_text("old")
    full = OSError(errno.ENOSPC, "No space left on device")
    for name, kept in (
        ("old.md", "the existing file is unchanged"),
        ("a.md", "no part of it"),
    ):
        with (
            pytest.raises(FileNotWrittenError, match=kept) as caught,
            atomic_path(tmp_path / name),
        ):
            raise full
        assert f"cannot write {str(tmp_path / name)!r}: No space left on device" in str(
            caught.value
        )
        assert "Free space there, or write elsewhere." in str(caught.value)
        assert "\n" not in str(caught.value)
        assert caught.value.errno == errno.ENOSPC
        copy = pickle.loads(pickle.dumps(caught.value))
        assert (str(copy), copy.errno) == (str(caught.value), errno.ENOSPC)


def test_a_file_is_on_the_disk_before_it_takes_its_place_and_its_folder_after(
    tmp_path, monkeypatch
):
    events = []
    sync, replace = os.fsync, Path.replace

    def fsync(file):
        events.append("folder" if os.path.isdir(f"/proc/self/fd/{file}") else "file")
        sync(file)

    def note(path, target):
        events.append("replace")
        return replace(path, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Path, "replace", note)
    write_text(tmp_path / "a.md", "a")
    assert events == ["file", "replace", "folder"]


def test_what_the_disk_reports_late_is_heard(tmp_path, monkeypatch):
    def fail(file):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", fail)
    (tmp_path / "a.md").write_text("old")
    with pytest.raises(FileNotWrittenError, match="Input/output error"):
        write_text(tmp_path / "a.md", "new")
    assert (tmp_path / "a.md").read_text() == "old"
    assert names(tmp_path) == ["a.md"]


def test_a_file_has_the_permissions_of_any_other(tmp_path):
    (tmp_path / "plain").write_text("")
    write_text(tmp_path / "a.md", "a")
    assert (tmp_path / "a.md").stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.parametrize("is_there", [True, False])
def test_a_file_is_written_where_a_link_leads(is_there, tmp_path):
    (tmp_path / "disk").mkdir()
    target, link = tmp_path / "disk/target", tmp_path / "link.json"
    if is_there:
        target.write_text("old")
    link.symlink_to(target)
    check_output_path(link, (".json",))
    write_json(link, {"a": 1})
    assert link.is_symlink()
    assert json.loads(target.read_text()) == {"a": 1}
    assert [file.name for file in target.parent.iterdir()] == ["target"]


def test_a_new_file_replaces_none(tmp_path):
    write_json(tmp_path / "a.json", 1, new=True)
    with pytest.raises(FileExistsError):
        write_json(tmp_path / "a.json", 2, new=True)
    assert json.loads((tmp_path / "a.json").read_text()) == 1
    assert names(tmp_path) == ["a.json"]


WRITING = """
import sys, time
from pathlib import Path
from xattn_video.files import atomic_path
with atomic_path(Path(sys.argv[1])) as temporary:
    temporary.write_text("half")
    print("writing", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def writer(tmp_path):
    """A process in the middle of writing a.mkv."""
    process = subprocess.Popen(
        [sys.executable, "-c", WRITING, str(tmp_path / "a.mkv")],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert process.stdout.readline() == "writing\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_what_a_killed_process_left_is_cleared_by_the_next_that_writes_there(writer, tmp_path):
    (left,) = names(tmp_path)
    assert str(writer.pid) in left
    assert left.endswith(".mkv")
    write_text(tmp_path / "b.md", "b")
    assert names(tmp_path) == sorted([left, "b.md"])  # It is alive.
    writer.send_signal(signal.SIGKILL)
    writer.wait()
    assert left in names(tmp_path)
    write_text(tmp_path / "b.md", "b")
    assert names(tmp_path) == ["b.md"]


def test_the_check_of_a_folder_clears_it_too(writer, tmp_path):
    writer.send_signal(signal.SIGKILL)
    writer.wait()
    check_output_folder(tmp_path)
    assert names(tmp_path) == []


def test_files_of_other_machines_are_cleared_only_when_old(tmp_path):
    fresh, old, foreign = (
        tmp_path / name
        for name in (".xattn-video-other-1-a.mkv", ".xattn-video-other-2-b.mkv", ".a.1.mkv")
    )
    for path in (fresh, old, foreign):
        path.write_text("")
    for path in (old, foreign):
        os.utime(path, (time.time() - 25 * 3600,) * 2)
    write_text(tmp_path / "a.md", "a")
    assert names(tmp_path) == sorted([fresh.name, foreign.name, "a.md"])


def test_a_file_without_locks_is_left_alone(tmp_path, monkeypatch):
    import fcntl

    def no_locks(file, operation):
        raise OSError(errno.ENOTSUP, "Operation not supported")

    with temporary_path(tmp_path, ".md") as own:
        monkeypatch.setattr(fcntl, "flock", no_locks)
        write_text(tmp_path / "a.md", "a")
        assert own.exists()
    assert names(tmp_path) == ["a.md"]


def test_a_file_that_is_cleared_before_it_is_locked_is_made_again(tmp_path, monkeypatch):
    import fcntl

    lock, cleared = fcntl.flock, []

    def clear_first(file, operation):
        if not cleared:
            cleared.extend(tmp_path.iterdir())
            cleared[0].unlink()
        lock(file, operation)

    monkeypatch.setattr(fcntl, "flock", clear_first)
    write_text(tmp_path / "a.md", "a")
    assert len(cleared) == 1
    assert (tmp_path / "a.md").read_text() == "a"


def test_paths_are_expanded(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("RUNS", "~/runs")
    assert user_path("~/a.mp4") == Path("/home/me/a.mp4")
    assert user_path("$HOME/a.mp4") == user_path("${HOME}/a.mp4") == Path("/home/me/a.mp4")
    for plain in ("a~b.mp4", "costs-$5.mp4", "plain/a.mp4", "~nobody-has-this-name.mp4"):
        assert user_path(plain) == Path(plain)
    monkeypatch.delenv("RUNS")
    with pytest.raises(ValueError, match=r"'\$RUNS/a' names \$RUNS, which is not set; set and"):
        user_path("$RUNS/a")


def calls(tree: ast.AST) -> list[ast.Call]:
    return [node for node in ast.walk(tree) if isinstance(node, ast.Call)]


# What these write is for a process that they start, in a folder that goes with it; and mutants are
# made of a package that must not be imported yet.
OTHERS = {
    "eval_vbench/vbench_process.py",
    "eval_vbench/run_folder.py",
    "scripts/mutation_run.py",
}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_is_written_but_through_a_temporary_file(path):
    if str(path.relative_to(ROOT)) in OTHERS:
        return
    for call in calls(ast.parse(path.read_text())):
        text = ast.unparse(call)
        function = ast.unparse(call.func)
        method = function.rpartition(".")[2]
        if method in ("write_text", "write_bytes") and "." in function:
            assert function.startswith("temporary."), text
        if method in ("savefig", "save_file", "mimwrite", "imwrite"):
            assert "temporary" in text, text
        if function in ("torch.save", "np.save"):
            assert {"temporary", "buffer"} & {ast.unparse(argument) for argument in call.args}
        if method == "open" and function != "os.open":
            modes = [a.value for a in call.args if isinstance(a, ast.Constant)]
            assert not {"w", "wb", "a"} & {mode for mode in modes if isinstance(mode, str)}, text


def test_every_path_argument_of_a_script_is_expanded():
    for path in SOURCES:
        for call in calls(ast.parse(path.read_text())):
            kinds = [ast.unparse(k.value) for k in call.keywords if k.arg == "type"]
            # Its paths are expanded after the imports that --help does without.
            if path.name != "train_demo_model.py":
                assert "Path" not in kinds, f"{path}: {ast.unparse(call)}"
