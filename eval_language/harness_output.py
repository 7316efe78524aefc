"""Hides a harness's own output, and keeps those of its warnings that say something of the run."""

import logging
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, redirect_stderr, redirect_stdout
from functools import partial
from io import StringIO
from typing import Any

from xattn_video.reporting.console import print_warning

# What is said of every run as it is made here, whatever it measures.
_CHATTER = re.compile(
    "model kwarg is not of type|already-initialized model|No aggregation function defined|"
    "Custom kwargs can be passed"
)
Tick = Callable[[], None]
"""Function to call after each sample."""
Shown = Callable[[], AbstractContextManager[object]]
"""Makes a context in which stderr is shown again."""


@contextmanager
def told_answers(model: Any, tick: Tick) -> Iterator[None]:
    """Hide a harness's output as `quiet_harness` does, and tick after each answer of the model.

    Args:
        model: A model of transformers that the harness calls `generate` of.
        tick: Called with stderr shown.
    """
    generate = model.generate
    with quiet_harness() as shown:

        def told(*arguments: Any, **options: Any) -> Any:
            answer = generate(*arguments, **options)
            with shown():
                tick()
            return answer

        model.generate = told
        try:
            yield
        finally:
            del model.generate


@contextmanager
def without_git(evaluator: Any) -> Iterator[None]:
    """Keep a harness from asking git for a commit, which prints an error where there is none.

    Args:
        evaluator: The harness's module `evaluator`.
    """
    ask, evaluator.get_git_commit_hash = evaluator.get_git_commit_hash, lambda: None
    try:
        yield
    finally:
        evaluator.get_git_commit_hash = ask


@contextmanager
def quiet_harness() -> Iterator[Shown]:
    """Hide what is printed within, but print each kind of warning once when the block ends.

    With --verbose everything is shown as it comes.
    """
    shown = partial(redirect_stderr, sys.stderr)
    if logging.getLogger("xattn_video").isEnabledFor(logging.INFO):
        yield shown
        return
    warned = _Warnings(logging.WARNING)
    root = logging.getLogger()
    root.addHandler(warned)
    try:
        # Tasks print; bars and the downloads of nltk write to stderr.
        with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
            yield shown
    finally:
        root.removeHandler(warned)
        warned.print_all()


class _Warnings(logging.Handler):
    """Keeps warnings by their kind, which is their text without its numbers."""

    def __init__(self, level: int) -> None:
        super().__init__(level)
        self._found: dict[str, list[str]] = {}

    def emit(self, record: logging.LogRecord) -> None:
        """Keep a warning, unless it says nothing of this run."""
        text = " ".join(record.getMessage().split())
        if not _CHATTER.search(text):
            self._found.setdefault(re.sub(r"\d+", "", text), []).append(text)

    def print_all(self) -> None:
        """Print the first of each kind."""
        for first, *others in self._found.values():
            more = f" ({len(others)} more like this)" if others else ""
            print_warning(f"{first}{more}")
