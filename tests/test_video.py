"""Video files, and the check that they can be written."""

import errno
import re
import sys
import tempfile
from pathlib import Path

import imageio.v3 as imageio
import numpy as np
import pytest
from fake_ffmpeg import FAULTS, install
from full_disk import KINDS, no_room, small_disk

from xattn_video.errors import FileNotWrittenError, MissingPackageError
from xattn_video.files import atomic_path, check_output_folder, check_output_path
from xattn_video.pipelines.video import (
    VIDEO_SUFFIXES,
    check_encoders,
    write_video,
    write_video_or_keep_frames,
)


def moving_square(num_frames: int = 9, height: int = 64, width: int = 48) -> np.ndarray:
    frames = np.zeros((num_frames, height, width, 3), np.uint8)
    for index, frame in enumerate(frames):
        frame[8:24, 2 * index : 2 * index + 16] = (220, 40, 30)
    return frames


def test_mp4_holds_the_frames(tmp_path):
    frames = moving_square()
    write_video(tmp_path / "a.mp4", frames, fps=12)
    read = imageio.imread(tmp_path / "a.mp4")
    assert read.shape == frames.shape
    assert np.abs(read.astype(int) - frames).mean() < 4
    assert imageio.immeta(tmp_path / "a.mp4")["fps"] == 12
    assert "h264" in imageio.immeta(tmp_path / "a.mp4")["codec"]


def test_mkv_is_lossless(tmp_path):
    frames = np.random.default_rng(0).integers(0, 256, (5, 32, 48, 3), dtype=np.uint8)
    write_video(tmp_path / "a.mkv", frames, fps=24)
    np.testing.assert_array_equal(imageio.imread(tmp_path / "a.mkv"), frames)


def test_one_frame_is_a_video_too(tmp_path):
    write_video(tmp_path / "a.mp4", moving_square(1), fps=24)
    assert imageio.imread(tmp_path / "a.mp4").shape == (1, 64, 48, 3)


def test_nothing_else_is_left_in_the_folder(tmp_path):
    write_video(tmp_path / "a.mp4", moving_square(2), fps=24)
    assert [path.name for path in tmp_path.iterdir()] == ["a.mp4"]


def test_a_write_that_fails_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.mp4"
    path.write_text("old")

    def write_half():
        with atomic_path(path) as temporary:
            temporary.write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        write_half()
    assert path.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["a.mp4"]


@pytest.mark.parametrize(
    "frames",
    [
        np.zeros((2, 32, 32, 3), np.float32),
        np.zeros((32, 32, 3), np.uint8),
        np.zeros((2, 31, 32, 3), np.uint8),
    ],
    ids=["float", "one image", "odd"],
)
def test_other_frames_are_refused(frames, tmp_path):
    with pytest.raises(ValueError, match=r"frames must be uint8 \[T, H, W, 3\] with H and W even"):
        write_video(tmp_path / "a.mp4", frames, fps=24)


def test_an_unknown_suffix_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"a video ends in \.mp4 or \.mkv"):
        write_video(tmp_path / "a.gif", moving_square(), fps=24)
    with pytest.raises(ValueError, match=r"output must end in \.mp4 or \.mkv, got .*a\.gif"):
        check_output_path(tmp_path / "a.gif", VIDEO_SUFFIXES)


def test_a_folder_in_the_files_place_is_refused(tmp_path):
    (tmp_path / "a.mp4").mkdir()
    with pytest.raises(ValueError, match="is a folder; give the name of a file"):
        check_output_path(tmp_path / "a.mp4", VIDEO_SUFFIXES)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        pytest.param("a" * 300 + ".mp4", "File name too long", id="too long"),
        pytest.param("a\0b.mp4", "embedded null byte", id="NUL"),
        pytest.param("a\0b/c.mp4", "embedded null byte", id="NUL in the folder"),
    ],
)
def test_a_name_that_cannot_be_written_is_refused(name, reason, tmp_path):
    with pytest.raises(ValueError, match=rf"output cannot be written to .*: {reason}; use anoth"):
        check_output_path(tmp_path / name, VIDEO_SUFFIXES)


def test_the_check_leaves_nothing_and_takes_nothing(tmp_path):
    (tmp_path / "a.mp4").write_text("old")
    check_output_path(tmp_path / "a.mp4", VIDEO_SUFFIXES)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["old"]


def test_a_folder_below_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"report cannot be written to .*file"):
        check_output_path(tmp_path / "file" / "a.json", (".json",), what="report")


@pytest.mark.skipif(sys.platform != "linux", reason="needs a folder that refuses even root")
def test_a_file_system_that_refuses_is_found_out():
    with pytest.raises(ValueError, match="output cannot be written to '/proc'"):
        check_output_folder(Path("/proc"))


@pytest.fixture(params=VIDEO_SUFFIXES)
def old_video(request, tmp_path):
    """A good video that will be written anew."""
    path = tmp_path / f"v{request.param}"
    write_video(path, moving_square(3), fps=24)
    return path


@pytest.mark.parametrize("fault", FAULTS)
def test_a_video_that_is_not_whole_does_not_count(fault, old_video, tmp_path, monkeypatch):
    before = old_video.read_bytes()
    (tmp_path / "bin").mkdir()
    install(monkeypatch, tmp_path / "bin", FAULTS[fault])
    message = r"cannot write '.*v\.m..': .*is unchanged"
    with pytest.raises(FileNotWrittenError, match=message) as caught:
        write_video(old_video, moving_square(), fps=24)
    assert "\n" not in str(caught.value)
    assert old_video.read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bin", old_video.name]


def noise(num_frames: int = 9) -> np.ndarray:
    """More bytes than any of the small disks has."""
    shape = (num_frames, 128, 128, 3)
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


@pytest.mark.parametrize("suffix", VIDEO_SUFFIXES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_full_disk_leaves_the_old_video_and_keeps_the_frames_elsewhere(
    kind, suffix, tmp_path, monkeypatch
):
    elsewhere = tmp_path / "tmp"
    elsewhere.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(elsewhere))
    with small_disk(kind, tmp_path / "disk") as folder:
        path = folder / f"v{suffix}"
        path.write_text("old")
        with no_room(kind, folder), pytest.raises(FileNotWrittenError) as caught:
            write_video_or_keep_frames(path, noise(), fps=24)
        assert path.read_text() == "old"
        assert [file.name for file in folder.iterdir()] == [path.name]
    text = str(caught.value)
    assert "\n" not in text
    assert caught.value.errno in (errno.ENOSPC, errno.EFBIG)
    if kind == "file size limit":
        assert "The frames: they were lost" in text
        assert list(elsewhere.iterdir()) == []
    else:
        (kept,) = elsewhere.iterdir()
        assert f"The frames: they are saved in {str(kept)!r}" in text
        np.testing.assert_array_equal(np.load(kept), noise())


def test_a_disk_that_fills_in_the_middle_of_a_video(tmp_path):
    """The encoder begins well and fails later, at the latest when it closes the file."""
    with small_disk("full disk", tmp_path / "disk") as folder:
        for suffix in VIDEO_SUFFIXES:
            path = folder / f"v{suffix}"
            write_video(path, moving_square(3), fps=24)
            before = path.read_bytes()
            with pytest.raises(FileNotWrittenError, match="No space left on device"):
                write_video(path, noise(), fps=24)
            assert path.read_bytes() == before
            assert [file.name for file in folder.iterdir()] == [path.name]
            path.unlink()


def test_frames_are_kept_beside_the_video_where_there_is_room(tmp_path, monkeypatch):
    (tmp_path / "bin").mkdir()
    install(monkeypatch, tmp_path / "bin", FAULTS["killed"])
    for name in ("v-frames.npy", "v-frames-2.npy"):
        with pytest.raises(FileNotWrittenError, match=rf"SIGKILL.*they are saved in '.*{name}'"):
            write_video_or_keep_frames(tmp_path / "v.mp4", moving_square(), fps=24)
        np.testing.assert_array_equal(np.load(tmp_path / name), moving_square())


def test_frames_are_kept_when_ffmpeg_is_gone(tmp_path, monkeypatch):
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", str(tmp_path / "gone"))
    with pytest.raises(FileNotWrittenError, match=r"videos need ffmpeg.*v-frames\.npy"):
        write_video_or_keep_frames(tmp_path / "v.mp4", moving_square(), fps=24)


@pytest.mark.parametrize("suffix", VIDEO_SUFFIXES)
@pytest.mark.parametrize("fps", [1, 7, 24, 60, 240])
def test_frames_of_any_kind_pass_the_check(suffix, fps, tmp_path):
    bits = np.random.default_rng(0).integers(0, 2, (33, 64, 48, 3), dtype=np.uint8)
    # Coloured noise is the worst for 4:2:0.
    write_video(tmp_path / f"a{suffix}", bits * np.uint8(255), fps)
    assert len(imageio.imread(tmp_path / f"a{suffix}")) == 33


def test_a_colon_in_a_folder_is_no_address(tmp_path):
    check_output_folder(tmp_path / "run:1")
    write_video(tmp_path / "run:1" / "a.mkv", moving_square(), fps=24)
    assert [path.name for path in (tmp_path / "run:1").iterdir()] == ["a.mkv"]


def not_executable(path: Path) -> None:
    path.write_text("#!/bin/sh")


def without(encoder: str):
    def make(path: Path) -> None:
        from imageio_ffmpeg import get_ffmpeg_exe

        says = f"echo \"Unknown encoder '{encoder}'\" >&2; exit 8"
        real = f'exec {get_ffmpeg_exe()} "$@"'
        path.write_text(f'#!/bin/sh\ncase "$*" in *{encoder}*) {says};; esac\n{real}\n')
        path.chmod(0o755)

    return make


BROKEN_FFMPEGS = {
    "missing": (lambda path: None, "videos need ffmpeg, .*No such file.*pip install"),
    "not executable": (not_executable, "videos need ffmpeg, .*Permission denied.*pip install"),
    "no libx264": (without("libx264"), "cannot write a .mp4 with libx264 .*Unknown encoder"),
    "no ffv1": (without("ffv1"), "cannot write a .mkv with ffv1 .*Unknown encoder"),
}


@pytest.mark.parametrize("name", BROKEN_FFMPEGS)
def test_an_ffmpeg_that_cannot_encode_is_found_out(name, tmp_path, monkeypatch):
    make, message = BROKEN_FFMPEGS[name]
    make(tmp_path / "ffmpeg")
    check_encoders(tmp_path, VIDEO_SUFFIXES, fps=24)
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", str(tmp_path / "ffmpeg"))
    with pytest.raises(MissingPackageError, match=message) as caught:
        check_encoders(tmp_path, VIDEO_SUFFIXES, fps=24)
    assert "\n" not in str(caught.value)
    assert {path.name for path in tmp_path.iterdir()} <= {"ffmpeg"}


def test_a_frame_rate_that_the_file_cannot_hold_is_found_out(tmp_path):
    """Matroska counts milliseconds, so frames would be lost."""
    with pytest.raises(MissingPackageError, match=re.escape("it holds 30 of 33 frames")):
        check_encoders(tmp_path, [".mkv"], fps=1200)


@pytest.mark.parametrize("kind", KINDS)
def test_a_disk_without_room_for_a_tiny_video_is_found_out(kind, tmp_path):
    with small_disk(kind, tmp_path / "disk") as folder, no_room(kind, folder):
        with pytest.raises(ValueError, match=r"can be written to .*; free space there"):
            check_encoders(folder, [".mkv"], fps=24)
        assert {path.name for path in folder.iterdir()} <= {"filler"}
