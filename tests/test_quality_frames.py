"""How near videos are to each other: frames, files, VMAF, and what is refused."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from imageio_ffmpeg import get_ffmpeg_exe

from xattn_video.errors import MissingPackageError
from xattn_video.measure import lpips, vmaf
from xattn_video.measure.clips import Clip, check_pair, read_clip
from xattn_video.measure.frames import MAX_PSNR, relative_error, score_frames
from xattn_video.measure.side_by_side import side_by_side
from xattn_video.measure.similarity import Scorer, is_plain
from xattn_video.pipelines.video import find_ffmpeg, write_video


def moving_square(num_frames: int = 9, height: int = 48, width: int = 64) -> np.ndarray:
    frames = np.full((num_frames, height, width, 3), 60, np.uint8)
    for index in range(num_frames):
        frames[index, 8:24, 2 * index : 2 * index + 16] = (200, 40, 90)
    return frames


@pytest.fixture
def no_vmaf(monkeypatch):
    monkeypatch.setattr("xattn_video.measure.similarity.vmaf_missing", lambda: "not here.")


def test_psnr_of_a_constant_offset_is_known():
    reference = np.full((3, 16, 16, 3), 100, np.uint8)
    scores = score_frames(reference, reference + np.uint8(10))
    assert scores.psnr == pytest.approx([20 * np.log10(25.5)] * 3, abs=1e-3)
    assert scores.num_identical == 0


def test_psnr_is_the_mean_over_frames_and_not_that_of_the_mean_error():
    reference = np.full((2, 16, 16, 3), 100, np.uint8)
    candidate = reference + np.array([5, 50], np.uint8)[:, None, None, None]
    expected = np.mean([20 * np.log10(51), 20 * np.log10(5.1)])
    found = Scorer(use_ffmpeg=False).score(Clip(reference, 24), Clip(candidate, 24))
    assert found.psnr == pytest.approx(expected, abs=1e-3)


def test_equal_frames_score_the_largest_value():
    scores = score_frames(moving_square(), moving_square())
    assert set(scores.psnr) == {MAX_PSNR}
    assert scores.ssim == pytest.approx([1] * len(scores.ssim))
    assert scores.num_identical == 9


def test_ssim_is_that_of_each_frame_whatever_the_chunk():
    """A window over time would see the frames around each one."""
    generator = np.random.default_rng(0)
    reference = generator.integers(0, 256, (10, 24, 24, 3), np.uint8)
    candidate = generator.integers(0, 256, (10, 24, 24, 3), np.uint8)
    together = score_frames(reference, candidate)
    for index in range(10):
        alone = score_frames(reference[index : index + 1], candidate[index : index + 1])
        assert together.ssim[index] == pytest.approx(alone.ssim[0], abs=1e-5)


def test_frames_of_other_shapes_are_refused():
    with pytest.raises(ValueError, match=r"one shape, got reference \[9, .* candidate \[5, "):
        score_frames(moving_square(9), moving_square(5))


def test_the_latents_error_is_relative():
    reference = torch.tensor([3.0, 4.0])
    assert relative_error(reference, reference) == 0
    assert relative_error(reference, torch.tensor([3.0, 4.5])) == pytest.approx(0.1)
    with pytest.raises(ValueError, match="the latents must have one shape"):
        relative_error(reference, torch.zeros(3))


@pytest.mark.parametrize(
    ("frames", "found"),
    [
        (np.zeros((2, 16, 16, 3), np.float32), r"float32 \[2, 16, 16, 3\]"),
        (np.zeros((2, 16, 16), np.uint8), r"uint8 \[2, 16, 16\]"),
        (np.zeros((0, 16, 16, 3), np.uint8), r"uint8 \[0, 16, 16, 3\]"),
    ],
)
def test_clips_are_checked(frames, found):
    with pytest.raises(ValueError, match=f"frames must be uint8 .* got {found}"):
        Clip(frames, 24)


@pytest.mark.parametrize(
    ("candidate", "message"),
    [
        (Clip(moving_square(5), 24), "differ in frames 9 and 5"),
        (Clip(moving_square(height=64), 24), "differ in size 64x48 and 64x64"),
        (Clip(moving_square(), 30), "differ in fps 24 and 30"),
        (Clip(moving_square(5, 64), 12), "frames 9 and 5, size 64x48 and 64x64, fps 24 and 12"),
    ],
    ids=["frames", "size", "fps", "all"],
)
def test_videos_that_do_not_fit_are_refused(candidate, message):
    with pytest.raises(ValueError, match=message):
        check_pair(Clip(moving_square(), 24), candidate)


def test_videos_too_small_for_ssim_are_refused():
    small = Clip(moving_square(3, 32, 32)[:, :10], 24)
    with pytest.raises(ValueError, match="the videos are 32x10 pixels; SSIM needs 11"):
        check_pair(small, small)


def test_a_lossless_file_is_read_as_it_was_written(tmp_path):
    path = tmp_path / "a.mkv"
    write_video(path, moving_square(), 12)
    clip = read_clip(path)
    assert np.array_equal(clip.frames, moving_square())
    assert (clip.fps, clip.codec, clip.is_lossless) == (12, "ffv1", True)


def test_an_mp4_is_known_to_have_lost_detail(tmp_path):
    path = tmp_path / "a.mp4"
    write_video(path, moving_square(), 24)
    assert not read_clip(path).is_lossless


def test_files_that_are_no_videos_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"there is no video '.*nowhere.mkv'"):
        read_clip(tmp_path / "nowhere.mkv")
    (tmp_path / "text.mkv").write_text("no video")
    with pytest.raises(
        ValueError, match=r"cannot read '.*text.mkv' as a video: .*is the file complete"
    ):
        read_clip(tmp_path / "text.mkv")


@pytest.mark.parametrize("suffix", [".mkv", ".mp4"])
def test_a_file_that_was_cut_short_is_refused(tmp_path, suffix):
    frames = np.random.default_rng(0).integers(0, 256, (24, 64, 64, 3), np.uint8)
    path = tmp_path / f"a{suffix}"
    write_video(path, frames, 24)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"is cut short: it states 24 frames|cannot read"):
        read_clip(path)


def test_without_ffmpeg_videos_are_refused(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", None)
    with pytest.raises(MissingPackageError, match=r"videos need ffmpeg, .*--no-videos"):
        find_ffmpeg()
    (tmp_path / "a.mkv").touch()
    with pytest.raises(MissingPackageError, match="videos need ffmpeg"):
        read_clip(tmp_path / "a.mkv")
    vmaf.vmaf_missing.cache_clear()
    assert "pip install imageio-ffmpeg" in vmaf.vmaf_missing()
    vmaf.vmaf_missing.cache_clear()


def test_an_ffmpeg_without_vmaf_is_a_reason(monkeypatch):
    filters = subprocess.CompletedProcess([], 0, stdout=" .. psnr VV->V \n", stderr="")
    monkeypatch.setattr(subprocess, "run", lambda *arguments, **options: filters)
    vmaf.vmaf_missing.cache_clear()
    assert "no libvmaf filter" in vmaf.vmaf_missing()
    vmaf.vmaf_missing.cache_clear()


def test_vmaf_is_relative_to_the_references_own():
    if vmaf.vmaf_missing() is not None:
        pytest.skip(vmaf.vmaf_missing())
    texture = np.random.default_rng(1).integers(0, 40, moving_square().shape[1:], np.uint8)
    reference = Clip(moving_square() // 2 + texture, 24)
    noise = np.random.default_rng(0).integers(0, 60, reference.frames.shape, np.uint8)
    scorer = Scorer()
    same = scorer.score(reference, reference)
    worse = scorer.score(reference, Clip(reference.frames // 2 + noise, 24))
    assert same.relative_vmaf == 100
    assert worse.vmaf_self == same.vmaf_self
    assert worse.relative_vmaf < 90


def test_vmaf_is_left_out_on_plain_videos():
    plain = Clip(moving_square(), 24)
    similarity = Scorer().score(plain, plain)
    assert similarity.plain
    assert similarity.vmaf is None
    texture = np.random.default_rng(0).integers(0, 20, plain.frames.shape, np.uint8)
    assert not is_plain(Clip(plain.frames // 2 + texture, 24))


def test_a_failing_ffmpeg_says_what_it_said(tmp_path):
    (tmp_path / "a.mkv").write_text("no video")
    with pytest.raises(RuntimeError, match=r"could not measure VMAF of '.*a.mkv': .*Invalid data"):
        vmaf.vmaf(tmp_path / "a.mkv", tmp_path / "a.mkv")
    assert get_ffmpeg_exe()


@pytest.mark.parametrize("content", [None, b""], ids=["absent", "empty"])
def test_lpips_needs_its_real_weights(tmp_path, monkeypatch, content):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    if content is not None:
        (tmp_path / "checkpoints").mkdir()
        (tmp_path / "checkpoints/alexnet-owt-7be5be79.pth").write_bytes(content)
    assert "AlexNet's weights were not found at" in lpips.lpips_missing()


def test_lpips_needs_torchvision(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setitem(sys.modules, "torchvision", None)
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints/alexnet-owt-7be5be79.pth").write_bytes(b"weights")
    assert "torchvision is not installed" in lpips.lpips_missing()


@pytest.mark.usefixtures("no_vmaf")
def test_what_cannot_be_measured_is_none_with_a_reason():
    scorer = Scorer()
    similarity = scorer.score(Clip(moving_square(), 24), Clip(moving_square(), 24))
    assert scorer.missing["VMAF"] == "not here."
    assert similarity.vmaf is None
    assert similarity.relative_vmaf is None


def test_without_torchmetrics_nothing_is_scored(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchmetrics.functional.image", None)
    with pytest.raises(MissingPackageError, match="pip install torchmetrics"):
        Scorer()


def test_side_by_side_shows_both_and_four_times_the_difference():
    reference = np.full((2, 32, 64, 3), 100, np.uint8)
    candidate = reference.copy()
    candidate[:, :16] += 10
    candidate[:, 16:] -= 90
    frames = side_by_side(Clip(reference, 24), Clip(candidate, 24), "dense", "a label " * 9)
    assert frames.shape == (2, 24 + 32, 3 * 64 + 2 * 4, 3)
    left, middle, right = frames[:, 24:, :64], frames[:, 24:, 68:132], frames[:, 24:, 136:]
    assert np.array_equal(left, reference)
    assert np.array_equal(middle, candidate)
    assert (right[:, :16] == 40).all()
    assert (right[:, 16:] == 252).all()
    assert all(frames[0, :24, start : start + 64].max() > 128 for start in (0, 68, 136))
    # However long a label is, it stays above its own picture.
    assert frames[0, :24, 132:136].max() == 0


def test_side_by_side_has_even_sides():
    clip = Clip(moving_square(2, 33, 47), 24)
    assert side_by_side(clip, clip, "a", "b").shape == (2, 58, 150, 3)
