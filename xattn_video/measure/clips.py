"""Videos to compare, as raw frames, from files or from a pipeline."""

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from xattn_video.pipelines.video import find_ffmpeg

LOSSLESS_CODECS = frozenset({"ffv1", "huffyuv", "ffvhuff", "utvideo", "rawvideo", "png"})
# The side of SSIM's window, in pixels.
_SMALLEST_SIDE = 11


@dataclass(frozen=True, slots=True)
class Clip:
    """A video in memory.

    Attributes:
        frames: uint8 `[T, H, W, 3]`, RGB.
        fps: Frames per second.
        codec: The codec of the file; None if the video comes from a pipeline.
    """

    frames: NDArray[np.uint8]
    fps: float
    codec: str | None = None

    def __post_init__(self) -> None:
        shape = self.frames.shape
        if self.frames.dtype != np.uint8 or len(shape) != 4 or shape[3] != 3 or 0 in shape:
            raise ValueError(
                "frames must be uint8 [T, H, W, 3] with at least one frame, "
                f"got {self.frames.dtype} {list(shape)}."
            )

    @property
    def is_lossless(self) -> bool:
        """Whether the frames are known to be stored without loss."""
        return self.codec is None or self.codec in LOSSLESS_CODECS


def read_clip(path: Path) -> Clip:
    """Read a video file.

    Raises:
        ValueError: The file is missing, cannot be read, is not a video, or is shorter than its
            header states.
        MissingPackageError: ffmpeg is missing.
    """
    find_ffmpeg()
    import imageio.v3 as imageio

    try:
        is_file = path.is_file()
    except OSError as error:
        raise ValueError(
            f"cannot read {str(path)!r}: {error.strerror}; give a readable video."
        ) from None
    if not is_file:
        raise ValueError(f"there is no video {str(path)!r}; give the name of a file.")
    try:
        described = imageio.immeta(path, plugin="FFMPEG")
        frames = imageio.imread(path, plugin="FFMPEG")
    except (OSError, ValueError, StopIteration) as error:
        detail = (str(error).strip().splitlines() or ["no frame was found"])[-1].strip()
        raise ValueError(
            f"cannot read {str(path)!r} as a video: {detail}; is the file complete?"
        ) from None
    fps, seconds = float(described["fps"]), float(described.get("duration") or 0)
    stated = round(seconds * fps)
    if len(frames) < stated - 1:
        raise ValueError(
            f"{str(path)!r} is cut short: it states {stated} frames and holds {len(frames)}; "
            "make it again."
        )
    return Clip(frames, fps, re.findall(r"\w+", described["codec"])[0])


def check_pair(reference: Clip, candidate: Clip) -> None:
    """Check that two clips can be compared frame by frame; nothing is resized or cut.

    Raises:
        ValueError: The clips differ in number of frames, size or frame rate, or are too small for
            SSIM.
    """
    found = {
        "frames": (len(reference.frames), len(candidate.frames)),
        "size": (_size(reference), _size(candidate)),
        "fps": (f"{reference.fps:g}", f"{candidate.fps:g}"),
    }
    different = [
        f"{what} {ours} and {theirs}" for what, (ours, theirs) in found.items() if ours != theirs
    ]
    if different:
        raise ValueError(
            f"the videos differ in {', '.join(different)} (reference and candidate); "
            "compare videos of one size, length and frame rate."
        )
    if min(reference.frames.shape[1:3]) < _SMALLEST_SIDE:
        raise ValueError(
            f"the videos are {_size(reference)} pixels; SSIM needs {_SMALLEST_SIDE} on each side."
        )


def _size(clip: Clip) -> str:
    height, width = clip.frames.shape[1:3]
    return f"{width}x{height}"
