"""The exceptions of `xattn_video`. Bad input raises ValueError or TypeError instead."""

import errno
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""The numbers of system errors that free space helps against."""


class XAttentionError(Exception):
    """Base class of the package's own exceptions."""


class BackendUnavailableError(XAttentionError, RuntimeError):
    """The requested backend cannot run the problem.

    Args:
        name: The backend, or ``"auto"`` when none of them can run.
        reasons: Every reason, each with its remedy.
    """

    def __init__(self, name: str, reasons: Sequence[str]) -> None:
        self.name = name
        self.reasons = list(reasons)
        lines = "".join(f"\n  - {reason}" for reason in self.reasons)
        super().__init__(f"attention backend {name!r} cannot run this problem:{lines}")

    def __reduce__(self) -> tuple[type, tuple[str, list[str]]]:
        return type(self), (self.name, self.reasons)


class UnsupportedModelError(XAttentionError, TypeError):
    """This package does not support the model."""


class UnboundProcessorError(XAttentionError, RuntimeError):
    """A processor was called before it was bound to its transformer."""


class ResidualMemoryError(XAttentionError, MemoryError):
    """There is no room for what the refreshes of a generation keep."""


class PipelineLoadError(XAttentionError, OSError):
    """A pipeline could not be loaded from the hub."""


class MissingPackageError(XAttentionError, ImportError):
    """A required optional package is missing or unusable."""


def require_packages(what: str, *names: str) -> None:
    """Check that packages are installed, so that a command names all it lacks at once.

    Args:
        what: Needs them, in the plural.
        names: As they are imported and installed.

    Raises:
        MissingPackageError: Some are not.
    """
    missing = [name for name in names if find_spec(name) is None]
    if missing:
        verb = "is" if len(missing) == 1 else "are"
        raise MissingPackageError(
            f"{what} need {' and '.join(missing)}, which {verb} not installed; "
            f"pip install {' '.join(missing)}."
        )


class FileNotWrittenError(XAttentionError, OSError):
    """A file could not be written; the previous file is unchanged.

    Args:
        path: The file.
        reason: What the system or a library said.
        number: The system's own, such as `errno.ENOSPC`; None where it is not known.
        more: Sentences to add.
    """

    def __init__(self, path: Path, reason: str, number: int | None = None, more: str = "") -> None:
        self.path, self.reason, self.more = path, reason, more
        kept = "the existing file is unchanged" if path.exists() else "no part of it is left"
        super().__init__(
            f"cannot write {str(path)!r}: {reason}; {kept}. "
            f"{'Free space there, or write' if number in NO_ROOM else 'Write'} elsewhere."
            f"{more and ' '}{more}"
        )
        self.errno = number

    def __reduce__(self) -> tuple[type, tuple[Path, str, int | None, str]]:
        return type(self), (self.path, self.reason, self.errno, self.more)
