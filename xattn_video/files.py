"""Write files completely or not at all, and expand paths as users type them."""

import contextlib
import errno
import json
import os
import platform
import re
import secrets
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xattn_video.errors import NO_ROOM, FileNotWrittenError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_PREFIX = ".xattn-video-"
# Writing a file takes minutes, so another machine's temporary file is stale after a day.
_STALE_SECONDS = 24 * 3600
# One block of most file systems; a full disk still accepts an empty file.
_BLOCK = bytes(4096)
RECORDS_FOLDER = "resume"
"""Name of the folder that holds the records of a run alone."""
# The records of a run (`ItemFolder`), wherever it keeps them. Every run has the first two.
_RECORDS = (
    *("settings.json", "locks", "names.json", "replaced.json", "items", "failures"),
    # Of a run of eval_vbench, which counts the files of these folders.
    *("videos", "lossless", "unfinished", "scores"),
)
_NO_FOLDER = (errno.EEXIST, errno.ENOTDIR, errno.ENOENT)
# Some file systems cannot sync a folder, and a writable folder need not be readable.
_CANNOT_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.EACCES, errno.EPERM)


def user_path(path: str | Path) -> Path:
    """Expand ``~`` and ``$VARIABLE``; a shell leaves them alone in ``--output=~/a.mp4``.

    Raises:
        ValueError: A variable is not set.
    """
    names = re.findall(r"\$\{?([A-Za-z_]\w*)", str(path))
    missing = [name for name in names if name not in os.environ]
    if missing:
        raise ValueError(
            f"the path {str(path)!r} names ${missing[0]}, which is not set; "
            "set and export it, or give the full path."
        )
    return Path(os.path.expandvars(os.path.expanduser(path)))


def check_output_path(path: Path, suffixes: tuple[str, ...], *, what: str = "output") -> None:
    """Check that ``path`` can be written later; creates nothing.

    Raises:
        ValueError: The suffix is wrong, ``path`` is a folder or among the records of a run, or it
            cannot be written.
    """
    if path.suffix.lower() not in suffixes:
        raise ValueError(
            f"{what} must end in {' or '.join(suffixes)}, got {str(path)!r}; "
            "give the name of such a file."
        )
    check_no_record(path, what=what)
    check_writable(path.parent, what=what)
    with _refused(path, what), contextlib.suppress(FileNotFoundError):
        path.lstat()  # finds a name that is too long
    if path.is_symlink():
        check_writable(Path(os.path.realpath(path)).parent, what=what)
    if path.is_dir():
        raise ValueError(f"{what} {str(path)!r} is a folder; give the name of a file.")


def check_no_record(path: Path, *, what: str = "output") -> None:
    """Check that a file or folder is not among the records and videos of a run.

    Raises:
        ValueError: It is.
    """
    with _refused(path, what):
        path = Path(os.path.realpath(path))
        for folder in path.parents:
            name = path.relative_to(folder).parts[0]
            is_record = folder.name == RECORDS_FOLDER or name in _RECORDS
            if is_record and all((folder / name).exists() for name in _RECORDS[:2]):
                raise ValueError(f"{str(folder)!r} holds the records of a run")


def check_run_folder(folder: Path, *, what: str = "output") -> None:
    """Check that files can be written in a folder, and that it is no part of another run.

    Raises:
        ValueError: The folder is among the records and videos of a run, or cannot be created or
            written.
    """
    check_no_record(folder, what=what)
    check_writable(folder, what=what)


def check_output_folder(folder: Path, *, what: str = "output") -> None:
    """Create ``folder`` if it is missing, and check that files can be written in it.

    Raises:
        ValueError: The folder cannot be created or written.
    """
    with _refused(folder, what):
        folder.mkdir(parents=True, exist_ok=True)
    check_writable(folder, what=what)
    clear_stale(folder)


def check_writable(folder: Path, *, what: str = "output") -> None:
    """Check that files can be written in ``folder`` once it is created; creates nothing.

    Raises:
        ValueError: The folder cannot be created or written.
    """
    nearest = existing_folder(folder)
    with _refused(folder, what):
        for name in folder.relative_to(nearest).parts:
            with contextlib.suppress(FileNotFoundError):
                (nearest / name).lstat()  # finds a name that is too long
        # A test file, because permission bits do not show a read-only or full file system.
        with tempfile.TemporaryFile(dir=nearest) as file:
            file.write(_BLOCK)
            file.flush()


def existing_folder(folder: Path) -> Path:
    """``folder``, or the nearest of its parents that exists."""
    return next((one for one in (folder, *folder.parents) if os.path.lexists(one)), folder)


@contextmanager
def _refused(path: Path, what: str) -> Iterator[None]:
    """Turn every failure into one ValueError: ``path`` cannot be written."""
    try:
        yield
    except (OSError, ValueError) as error:
        # An invalid name, such as one with a NUL, is a ValueError.
        reason, number = getattr(error, "strerror", error), getattr(error, "errno", None)
        parts = (path, *path.parents)
        # A link that leads nowhere is in the place of a folder too.
        blocking = next((part for part in parts if os.path.lexists(part)), path)
        if number in _NO_FOLDER and not blocking.is_dir():
            reason = f"{str(blocking)!r} is a file, not a folder"
        raise ValueError(
            f"{what} cannot be written to {str(path)!r}: {reason}; "
            f"{'free space there, or use another' if number in NO_ROOM else 'use another'}."
        ) from None


@contextmanager
def atomic_path(path: str | Path, *, new: bool = False) -> Iterator[Path]:
    """A temporary path in the same folder that replaces ``path`` on success.

    Missing parent folders are created. A link stays, and the file that it leads to is replaced.
    The file is synced to disk first. It has the suffix of ``path``, from which libraries choose
    the format. Temporary files of killed runs are removed from the folder beforehand.

    Args:
        path: The file.
        new: Raise instead of replacing an existing file.

    Raises:
        FileNotWrittenError: Writing failed; the previous file at ``path`` is unchanged.
        FileExistsError: ``new`` is set and the file exists.
    """
    path, target = Path(path), Path(os.path.realpath(path))
    with _told(path), contextlib.ExitStack() as stack:
        # A file in the place of the folder is told below, and not as an existing ``path``.
        with contextlib.suppress(FileExistsError):
            target.parent.mkdir(parents=True, exist_ok=True)
        clear_stale(target.parent)
        temporary = stack.enter_context(temporary_path(target.parent, path.suffix))
        yield temporary
        _sync(temporary)
        if new:
            os.link(temporary, target)
        else:
            temporary.replace(target)
        _sync_folder(target.parent)


@contextmanager
def _told(path: Path) -> Iterator[None]:
    """Turn a system error into one that names the file and the remedy."""
    try:
        yield
    except (FileNotWrittenError, FileExistsError):
        raise
    except OSError as error:
        raise FileNotWrittenError(path, error.strerror or str(error), error.errno) from error


@contextmanager
def temporary_path(folder: Path, suffix: str) -> Iterator[Path]:
    """A temporary empty file in ``folder``, removed afterwards; it is locked while in use.

    Its name contains an ID of the machine (which changes at a restart) and of the process.
    """
    while True:
        token = secrets.token_hex(4)
        path = folder / f"{_PREFIX}{_machine()}-{os.getpid()}-{token}{suffix}"
        file = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o666)
        _lock(file, wait=True)
        if path.exists():
            break
        os.close(file)  # Another process removed it before it was locked.
    try:
        if sys.platform == "win32":
            os.close(file)  # Windows cannot replace an open file.
        yield path
    finally:
        path.unlink(missing_ok=True)
        if sys.platform != "win32":
            os.close(file)


def clear_stale(folder: Path) -> None:
    """Remove the temporary files of killed runs from ``folder``, and no others.

    The system releases a lock however its process ends, so a file without a lock is stale. On
    some file systems other machines do not see locks, so another machine's file must also be old.
    """
    with contextlib.suppress(FileNotFoundError), os.scandir(folder) as entries:
        found = [Path(entry.path) for entry in entries if entry.name.startswith(_PREFIX)]
        for path in found:
            # It is gone, belongs to another user, or is in use.
            with contextlib.suppress(OSError):
                _remove_if_stale(path)


def _remove_if_stale(path: Path) -> None:
    here = path.name.startswith(f"{_PREFIX}{_machine()}-")
    if not here and time.time() - path.stat().st_mtime < _STALE_SECONDS:
        return
    file = os.open(path, os.O_RDWR)
    try:
        if _lock(file, wait=False):
            path.unlink()
    finally:
        os.close(file)


def _lock(file: int, *, wait: bool) -> bool:
    """Try to lock a file; return whether that worked. Some file systems have no locks."""
    if sys.platform == "win32":
        return False
    import fcntl

    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:
        return False
    return True


def _machine() -> str:
    """An ID of the running system kernel; all containers on it count as one machine."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text()[:8]
    except OSError:
        return re.sub(r"\W", "", platform.node())[:8]


def write_text(path: str | Path, text: str) -> None:
    """Write a text to ``path`` completely, or raise FileNotWrittenError and leave it unchanged."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | Path, content: Any, *, indent: int = 2, new: bool = False) -> None:
    """Write JSON to ``path`` completely, or leave it unchanged; ``new`` as in `atomic_path`."""
    text = json.dumps(content, indent=indent)
    with atomic_path(path, new=new) as temporary:
        temporary.write_text(f"{text}\n", encoding="utf-8")


def read_record(path: Path, *names: str) -> dict[str, Any] | None:
    """The JSON object of a file; None where it is missing, broken or lacks one of ``names``."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    return record if isinstance(record, dict) and record.keys() >= set(names) else None


def write_figure(path: str | Path, figure: "Figure", dpi: int = 150) -> None:
    """Write a figure to ``path`` completely, or leave the file unchanged."""
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=dpi)


def _sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk; raise if that fails."""
    file = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def _sync_folder(folder: Path) -> None:
    if sys.platform == "win32":
        return
    try:
        _sync(folder)
    except OSError as error:
        if error.errno not in _CANNOT_SYNC:
            raise
