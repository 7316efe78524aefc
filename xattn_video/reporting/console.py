"""What the command line prints, where it goes, and what libraries may add."""

import functools
import logging
import re
import warnings
from collections.abc import Callable, Iterable, Mapping
from contextvars import ContextVar
from functools import partial
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import typer
from rich.console import Console
from rich.text import Text

from xattn_video.files import user_path

P = ParamSpec("P")
T = TypeVar("T")

TYPED_OPTIONS: ContextVar[Mapping[str, str] | None] = ContextVar("typed_options", default=None)
"""Of the command that runs: the option as typed of each name that messages have for it."""

# With --quiet its level is ERROR.
_PROGRESS = logging.getLogger("xattn_video.progress")


def output_console() -> Console:
    """Results, on stdout; plain text where that is no terminal."""
    return Console(highlight=False, markup=False, emoji=False)


def message_console() -> Console:
    """Warnings and errors, on stderr."""
    return Console(stderr=True, highlight=False, markup=False, emoji=False)


def progress_console() -> Console:
    """Progress, on stderr; nothing with --quiet."""
    console = message_console()
    console.quiet = not _PROGRESS.isEnabledFor(logging.WARNING)
    return console


def print_message(text: str) -> None:
    """Print a line of progress on stderr, uncut."""
    progress_console().print(text, soft_wrap=True)


def print_warning(text: str) -> None:
    """Print one warning on stderr."""
    line = Text.assemble(("warning: ", "yellow"), as_typed(text))
    message_console().print(line, soft_wrap=True)


def print_warnings(texts: Iterable[str]) -> None:
    """Print each warning on stderr."""
    for text in texts:
        print_warning(text)


def print_error(text: str) -> None:
    """Print an error on stderr."""
    line = Text.assemble(("error: ", "bold red"), as_typed(text))
    message_console().print(line, soft_wrap=True)


def print_interruption(done: str = "", by: str = "") -> None:
    """Print on stderr that the run was interrupted, and what was done until then."""
    text = f"interrupted{by and f' by {by}'}{done and f'; {done}'}."
    message_console().print(text, soft_wrap=True)


def print_labelled(console: Console, lines: dict[str, str]) -> None:
    """One line for each label; a terminal wraps it, a file keeps it whole."""
    for label, text in lines.items():
        console.print(Text.assemble((f"{label:<11}", "bold"), text), soft_wrap=True)


def expands_paths(command: Callable[P, T]) -> Callable[P, T]:
    """A command whose paths may begin with ~ and name $VARIABLES, whatever the option."""

    @functools.wraps(command)
    def run(*args: P.args, **options: P.kwargs) -> T:
        try:
            expanded: Any = {name: _expanded(value) for name, value in options.items()}
        except ValueError as error:
            raise typer.BadParameter(str(error)) from None
        return command(*args, **expanded)

    return run


def _expanded(value: Any) -> Any:
    """A path, or those of a list; anything else as it is."""
    if isinstance(value, list):
        return [_expanded(part) for part in value]
    return user_path(value) if isinstance(value, Path) else value


def as_typed(text: str) -> str:
    """A message with the options of the command that runs as they are typed.

    A name of one word stands for its option only where a message is about its value, or in a list
    of options. Within --setting, names are typed as they are.
    """
    options = TYPED_OPTIONS.get() or {}
    if text.startswith("--setting "):
        return text
    for name, typed in options.items():
        about = r"(?!\w)" if "_" in name else r"(?=( must| lies| cannot be written)\b|=)"
        text = re.sub(rf"(?<![\w./'-]){name}{about}", typed, text)
    return re.sub(r"[\w-]+(, [\w-]+)+", partial(_list_as_typed, options), text)


def _list_as_typed(options: Mapping[str, str], found: re.Match[str]) -> str:
    """A list of names, if some of them are options."""
    words = found[0].split(", ")
    if not any(word in options.values() for word in words):
        return found[0]
    return ", ".join(options.get(word, word) for word in words)


def log_choices(verbose: bool, quiet: bool = False) -> None:
    """If ``verbose``, log the choices of this package; else hide even the hub's retries.

    If ``quiet``, show no progress, not even that of downloads.
    """
    _PROGRESS.setLevel(logging.ERROR if quiet else logging.NOTSET)
    if quiet:
        from huggingface_hub.utils import disable_progress_bars  # type: ignore[attr-defined]

        disable_progress_bars()
    if verbose:
        logging.basicConfig(level=logging.WARNING, format="%(name)s: %(message)s")
        logging.getLogger("xattn_video").setLevel(logging.INFO)
    else:
        # By its own function: it sets its logger's level anew when it is first imported.
        from huggingface_hub.utils import logging as hub_logging

        hub_logging.set_verbosity(logging.ERROR)


def quiet_libraries() -> None:
    """Hide the advice and progress bars of Diffusers and Transformers, except downloads."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    warnings.simplefilter("ignore")
    for library in (diffusers_logging, transformers_logging):
        library.set_verbosity_error()
        library.disable_progress_bar()
