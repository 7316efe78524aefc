"""Players of a web page: pictures side by side in one small video, with measures by frame."""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from xattn_video.measure.clips import Clip
from xattn_video.measure.frames import MAX_PSNR, score_frames
from xattn_video.measure.side_by_side import GAIN, amplified_difference
from xattn_video.pipelines.video import write_video
from xattn_video.reporting.web_page import Curve, Player

if TYPE_CHECKING:
    from numpy.typing import NDArray

# Largest side of a picture in pixels; a page shows three pictures in a width of 1,088.
_LARGEST_SIDE = 480


def compared_player(
    title: str, reference: Clip, label: str, candidate: Clip, reference_label: str = "dense"
) -> Player:
    """A player of a video, its reference and their difference, with PSNR and SSIM by frame.

    Args:
        title: The title, different from those of the other players.
        reference: The reference, usually the dense video.
        label: Label of ``candidate``.
        candidate: A video of the same size and length.
        reference_label: Label of ``reference``.

    Raises:
        ValueError: The two differ in size or length.
    """
    scores = score_frames(reference.frames, candidate.frames)
    curves = (
        Curve("PSNR", "dB", scores.psnr, digits=1, cap=MAX_PSNR),
        Curve("SSIM", "", scores.ssim, digits=4, cap=1.0),
    )
    difference = amplified_difference(reference.frames, candidate.frames)
    pictures = (
        (reference_label, reference.frames),
        (label, candidate.frames),
        (f"difference, {GAIN} times as bright", difference),
    )
    return _player(title, pictures, reference.fps, curves)


def single_player(title: str, label: str, clip: Clip) -> Player:
    """A player of one video."""
    return _player(title, ((label, clip.frames),), clip.fps, ())


def _player(
    title: str,
    pictures: "Sequence[tuple[str, NDArray[np.uint8]]]",
    fps: float,
    curves: tuple[Curve, ...],
) -> Player:
    small = [_reduced(frames) for _, frames in pictures]
    num_frames, height, width = small[0].shape[:3]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "page.webm")
        write_video(path, np.concatenate(small, axis=2), max(1, round(fps)))
        video = path.read_bytes()
    labels = tuple(label for label, _ in pictures)
    return Player(title, labels, video, width, height, num_frames, round(fps), curves)


def _reduced(frames: "NDArray[np.uint8]") -> "NDArray[np.uint8]":
    """The frames reduced to at most `_LARGEST_SIDE` pixels per side, H and W even."""
    from PIL import Image

    height, width = frames.shape[1:3]
    scale = min(1.0, _LARGEST_SIDE / max(height, width))
    size = (max(2, int(width * scale) // 2 * 2), max(2, int(height * scale) // 2 * 2))
    if size == (width, height):
        return frames
    return np.stack([np.asarray(Image.fromarray(frame).resize(size)) for frame in frames])
