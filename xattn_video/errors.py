"""The exceptions of `xattn_video`. Bad input raises ValueError or TypeError instead."""

from collections.abc import Sequence


class XAttentionError(Exception):
    """Base class of the package's own exceptions."""


class BackendUnavailableError(XAttentionError, RuntimeError):
    """A backend was asked for that cannot run the problem.

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
    """The model is not one whose attention this package knows."""


class UnboundProcessorError(XAttentionError, RuntimeError):
    """A processor was called before it was bound to its transformer."""


class PipelineLoadError(XAttentionError, OSError):
    """A pipeline could not be had from the hub."""


class MissingPackageError(XAttentionError, ImportError):
    """An optional package that is needed cannot be used."""
