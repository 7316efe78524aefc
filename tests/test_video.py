"""Video files, and the check that they can be written."""

import sys
from pathlib import Path

import imageio.v3 as imageio
import numpy as np
import pytest

from xattn_video.pipelines.video import (
    VIDEO_SUFFIXES,
    atomic_path,
    check_output_folder,
    check_output_path,
    write_video,
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


def test_missing_folders_are_made(tmp_path):
    check_output_path(tmp_path / "new" / "deep" / "a.mp4", VIDEO_SUFFIXES)
    assert (tmp_path / "new" / "deep").is_dir()


def test_a_folder_in_the_files_place_is_refused(tmp_path):
    (tmp_path / "a.mp4").mkdir()
    with pytest.raises(ValueError, match="is a folder; give the name of a file"):
        check_output_path(tmp_path / "a.mp4", VIDEO_SUFFIXES)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        pytest.param("a" * 247 + ".mp4", "File name too long", id="its temporary is too long"),
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
