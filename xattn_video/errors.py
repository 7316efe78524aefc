"""The exceptions of `xattn_video`. Bad input raises ValueError or TypeError instead."""

import errno
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Error numbers (errno) of writes that fail for lack of space."""


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
    """There is not enough memory for the residuals of a generation."""


class PipelineLoadError(XAttentionError, OSError):
    """A pipeline could not be loaded from the hub."""


class MissingPackageError(XAttentionError, ImportError):
    """A required optional package is missing or unusable."""


def require_packages(what: str, *names: str) -> None:
    """Check that packages are installed; the error names all that are missing.

    Args:
        what: What needs them, a plural for the message.
        names: Names under which they are both imported and installed.

    Raises:
        MissingPackageError: At least one is not installed.
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
        reason: The message of the system or of a library.
        number: The system's error number, such as `errno.ENOSPC`; None if unknown.
        more: Sentences to add to the message.
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
