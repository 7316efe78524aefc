"""Write videos, and find out beforehand whether a file can be written."""

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

# Suffix -> what imageio's ffmpeg plugin is told. Matroska holds the frames without loss.
_ENCODERS: dict[str, dict[str, Any]] = {
    ".mp4": {
        "codec": "libx264",
        "pixelformat": "yuv420p",
        "quality": 8,
        "output_params": ["-movflags", "+faststart"],
    },
    ".mkv": {"codec": "ffv1", "pixelformat": "bgr0", "quality": None},
}
VIDEO_SUFFIXES = tuple(_ENCODERS)


def check_output_path(path: Path, suffixes: tuple[str, ...], *, what: str = "output") -> None:
    """Make sure that ``path`` can be written later; missing parent folders are created now.

    Raises:
        ValueError: Wrong suffix, a folder is in its place, or it cannot be written.
    """
    if path.suffix.lower() not in suffixes:
        raise ValueError(
            f"{what} must end in {' or '.join(suffixes)}, got {str(path)!r}; "
            "give the name of such a file."
        )
    check_output_folder(path.parent, what=what)
    with _refused(path, what):
        is_folder = path.is_dir()
        # The very file that will be written: its name is longer than the path's.
        temporary = _temporary_path(path)
        temporary.touch()
        temporary.unlink()
    if is_folder:
        raise ValueError(f"{what} {str(path)!r} is a folder; give the name of a file.")


def check_output_folder(folder: Path, *, what: str = "output") -> None:
    """Create ``folder`` where it is missing and make sure that files can be written in it.

    Raises:
        ValueError: It cannot be created or written.
    """
    with _refused(folder, what):
        folder.mkdir(parents=True, exist_ok=True)
        # Permission bits say nothing of a read-only file system; a file does.
        with tempfile.TemporaryFile(dir=folder):
            pass


@contextmanager
def _refused(path: Path, what: str) -> Iterator[None]:
    """Say in one way that ``path`` cannot be written."""
    try:
        yield
    except (OSError, ValueError) as error:
        # A name that no system takes, such as one with a NUL, is a ValueError.
        reason = error.strerror if isinstance(error, OSError) else error
        if isinstance(error, FileExistsError | NotADirectoryError):
            blocking = next(part for part in (path, *path.parents) if part.is_file())
            reason = f"{str(blocking)!r} is a file, not a folder"
        raise ValueError(
            f"{what} cannot be written to {str(path)!r}: {reason}; use another."
        ) from None


def write_video(path: Path, frames: "NDArray[np.uint8]", fps: int) -> None:
    """Write ``frames`` to ``path``, which holds the whole video or is not there.

    Args:
        path: ``.mp4`` (H.264, 4:2:0, plays everywhere) or ``.mkv`` (FFV1, lossless).
        frames: uint8 `[T, H, W, 3]`, RGB; H and W even.
        fps: Frames per second.

    Raises:
        ValueError: Unknown suffix, or frames of another shape or dtype.
    """
    import imageio.v2 as imageio

    suffix = path.suffix.lower()
    if suffix not in _ENCODERS:
        raise ValueError(f"a video ends in {' or '.join(_ENCODERS)}, got {str(path)!r}.")
    shape = frames.shape
    even = len(shape) == 4 and shape[1] % 2 == 0 and shape[2] % 2 == 0
    if frames.dtype != "uint8" or not even or shape[3] != 3:
        raise ValueError(
            "frames must be uint8 [T, H, W, 3] with H and W even, "
            f"got {frames.dtype} {list(shape)}."
        )
    with atomic_path(path) as temporary:
        imageio.mimwrite(
            temporary,
            list(frames),
            format="FFMPEG",
            fps=fps,
            macro_block_size=2,
            ffmpeg_log_level="error",
            **_ENCODERS[suffix],
        )


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A temporary path in the same folder that takes the place of ``path`` when all went well."""
    temporary = _temporary_path(path)
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, record: dict[str, Any]) -> None:
    """Write ``record`` to ``path``, which holds all of it or stays as it was."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def _temporary_path(path: Path) -> Path:
    """Of this process, with the suffix that tells a library what to write."""
    return path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
