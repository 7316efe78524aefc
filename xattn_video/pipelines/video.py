"""Writes videos, and checks in advance that they can be written."""

import errno
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterable
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from xattn_video.errors import NO_ROOM, FileNotWrittenError, MissingPackageError
from xattn_video.files import atomic_path, existing_folder, temporary_path

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

# Suffix -> encoder options of ffmpeg. Matroska stores the frames without loss.
_ENCODERS = {
    ".mp4": "-c:v libx264 -pix_fmt yuv420p -crf 10 -movflags +faststart",
    ".mkv": "-c:v ffv1 -pix_fmt bgr0",
    # For web pages: every free browser can decode it and seek to any frame quickly.
    ".webm": "-c:v libvpx-vp9 -pix_fmt yuv420p -crf 22 -b:v 0 -g 12 -deadline good -cpu-used 5 "
    "-row-mt 1 -vf scale=out_color_matrix=bt709 -colorspace bt709 -color_primaries bt709 "
    "-color_trc bt709",
}
VIDEO_SUFFIXES = (".mp4", ".mkv")
_LOSSLESS = ".mkv"
# Largest mean difference in luma, of 255. Coloured noise, the worst case for 4:2:0, has 7.
_MAX_LUMA_ERROR = 16
# With so many frames, a container with too coarse time stamps loses at least one.
_PROBE_FRAMES = 33


def write_video(path: Path, frames: "NDArray[np.uint8]", fps: int) -> None:
    """Write ``frames`` to ``path``. On failure, ``path`` is unchanged.

    The file gets its final name only after it was encoded and read back successfully.

    Args:
        path: ``.mp4`` (H.264, 4:2:0, plays everywhere), ``.mkv`` (FFV1, lossless) or ``.webm``
            (VP9, 4:2:0, smaller, for web pages).
        frames: uint8 `[T, H, W, 3]`, RGB; H and W even.
        fps: Frames per second.

    Raises:
        ValueError: Unknown suffix, or frames of another shape or dtype.
        FileNotWrittenError: The disk is full, or the encoder failed.
        MissingPackageError: ffmpeg is missing.
    """
    suffix = path.suffix.lower()
    if suffix not in _ENCODERS:
        raise ValueError(f"a video ends in {' or '.join(_ENCODERS)}, got {str(path)!r}.")
    shape = frames.shape
    even = len(shape) == 4 and shape[1] % 2 == 0 and shape[2] % 2 == 0
    if frames.dtype != "uint8" or not even or shape[3] != 3 or 0 in shape:
        raise ValueError(
            "frames must be uint8 [T, H, W, 3] with H and W even and at least one frame, "
            f"got {frames.dtype} {list(shape)}."
        )
    with atomic_path(path) as temporary:
        _encode(temporary, frames, fps)
        _check_written(temporary, frames)


def write_video_or_keep_frames(path: Path, frames: "NDArray[np.uint8]", fps: int) -> None:
    """Like `write_video`, but keep the frames in the same or a temporary folder if it fails.

    Raises:
        FileNotWrittenError: The video could not be written; the message names the kept frames.
    """
    try:
        write_video(path, frames, fps)
    except (OSError, MissingPackageError) as error:
        kept = _keep_frames(path, frames)
        found = "they were lost: no disk here has room for them."
        if kept is not None:
            found = (
                f"they are saved in {str(kept)!r}: load them with numpy.load and write the video "
                "with xattn_video.pipelines.video.write_video."
            )
        reason = error.reason if isinstance(error, FileNotWrittenError) else str(error)
        number = getattr(error, "errno", None)
        raise FileNotWrittenError(path, reason, number, f"The frames: {found}") from error


def _keep_frames(path: Path, frames: "NDArray[np.uint8]") -> Path | None:
    """Write the frames and return their path; None if no disk has room."""
    import numpy as np

    for beside in (True, False):
        try:
            folder = path.parent if beside else Path(tempfile.gettempdir())
            if shutil.disk_usage(folder).free < frames.nbytes:
                continue
            number, kept = 2, folder / f"{path.stem}-frames.npy"
            while kept.exists():
                kept, number = folder / f"{path.stem}-frames-{number}.npy", number + 1
            with atomic_path(kept) as temporary:
                np.save(temporary, frames)
        except OSError:
            continue
        return kept
    return None


def check_encoders(folder: Path, suffixes: Iterable[str], fps: int) -> None:
    """Write tiny videos with the real ffmpeg, and remove them.

    They are written in ``folder``, or in the nearest of its parents that exists.

    Raises:
        MissingPackageError: ffmpeg is missing, cannot be run or lacks the encoder.
        ValueError: The written video would be wrong, for instance at this frame rate.
    """
    import numpy as np

    shape = (_PROBE_FRAMES, 16, 16, 3)
    frames = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    for suffix in dict.fromkeys(suffixes):
        with temporary_path(existing_folder(folder), suffix) as path:
            try:
                _encode(path, frames, fps)
                _check_written(path, frames)
            except OSError as error:
                if error.errno in NO_ROOM:
                    raise ValueError(
                        f"no {suffix} can be written to {str(folder)!r}: {error.strerror}; "
                        "free space there, or write elsewhere."
                    ) from None
                encoder = _ENCODERS[suffix].split()[1]
                raise MissingPackageError(
                    f"the ffmpeg {find_ffmpeg()!r} cannot write a {suffix} with {encoder} at "
                    f"{fps} frames per second: {error.strerror or error}; use another frame rate "
                    f"or an ffmpeg with {encoder}, such as that of pip install imageio-ffmpeg "
                    "(unset IMAGEIO_FFMPEG_EXE)."
                ) from None


def find_ffmpeg() -> str:
    """The path of an ffmpeg that can be run.

    Raises:
        MissingPackageError: ffmpeg is missing or cannot be run.
    """
    try:
        import imageio.v3  # noqa: F401
        from imageio_ffmpeg import get_ffmpeg_exe

        ffmpeg: str = get_ffmpeg_exe()
        # get_ffmpeg_exe does not test an ffmpeg named by IMAGEIO_FFMPEG_EXE.
        subprocess.run([ffmpeg, "-version"], capture_output=True, check=True)
    except (ImportError, OSError, RuntimeError, subprocess.CalledProcessError) as error:
        raise MissingPackageError(
            f"videos need ffmpeg, which cannot be used: {error}; pip install 'imageio[ffmpeg]' "
            "and unset IMAGEIO_FFMPEG_EXE (compare works without videos: --no-videos)."
        ) from None
    return ffmpeg


def _encode(path: Path, frames: "NDArray[np.uint8]", fps: int) -> None:
    """Let ffmpeg write a file.

    Raises:
        OSError: ffmpeg failed.
    """
    import numpy as np

    height, width = frames.shape[1:3]
    command = [find_ffmpeg(), *["-y", "-v", "error", "-f", "rawvideo", "-pix_fmt", "rgb24"]]
    command += ["-s", f"{width}x{height}", "-r", str(fps), "-i", "-", "-an"]
    command += [*_ENCODERS[path.suffix.lower()].split(), _for_ffmpeg(path)]
    done = subprocess.run(
        command,
        input=np.ascontiguousarray(frames).data.cast("B"),
        capture_output=True,
        # Only this process receives Ctrl-C; it then ends ffmpeg.
        start_new_session=True,
    )
    if done.returncode:
        _raise_failure(done.returncode, done.stderr.decode(errors="replace"))


def _for_ffmpeg(path: Path) -> str:
    """The path as a file URL, because ffmpeg takes a name with a colon for a URL."""
    return f"file:{path}"


def _raise_failure(code: int, said: str) -> NoReturn:
    """Raise OSError with ffmpeg's message, and with the system's error number if it names one."""
    if code == -getattr(signal, "SIGXFSZ", 0):
        raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))
    for number in NO_ROOM:
        if os.strerror(number) in said:
            raise OSError(number, os.strerror(number))
    lines = said.strip().splitlines()
    ending = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    raise OSError(f"ffmpeg failed ({ending}){': ' if lines else ''}{' '.join(lines[:1])}")


def _check_written(path: Path, frames: "NDArray[np.uint8]") -> None:
    """Read a written video back and compare it with the frames.

    Raises:
        OSError: The video does not hold these frames.
    """
    import numpy as np
    from imageio_ffmpeg import read_frames

    count, height, width = frames.shape[:3]
    number = 0
    try:
        with closing(read_frames(_for_ffmpeg(path))) as reader:
            size = next(reader)["size"]
            if size != (width, height):
                raise OSError(f"it holds {size[0]}x{size[1]} pixels, not {width}x{height}")
            for number, data in enumerate(reader, 1):
                if number in (1, count):
                    read = np.frombuffer(data, np.uint8).reshape(height, width, 3)
                    if not _alike(read, frames[number - 1], path.suffix.lower()):
                        raise OSError(f"frame {number} is not what was written")
            if number != count:
                raise OSError(f"it holds {number} of {count} frames")
    except (OSError, RuntimeError, StopIteration) as error:
        detail = (str(error).strip().splitlines() or ["it holds no frame"])[-1]
        raise OSError(f"it could not be read back: {detail}") from None


def _alike(read: "NDArray[np.uint8]", written: "NDArray[np.uint8]", suffix: str) -> bool:
    """Whether the frames are equal (lossless) or have about the same brightness (lossy)."""
    import numpy as np

    if suffix == _LOSSLESS:
        return np.array_equal(read, written)
    luma = (read.astype(np.float32) - written) @ np.array([0.299, 0.587, 0.114], np.float32)
    return bool(np.abs(luma).mean() < _MAX_LUMA_ERROR)
