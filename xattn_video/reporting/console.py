"""What the command line prints, on which stream, and which libraries may print too."""

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
"""{name in messages: option as typed} of the running command."""

# Its level is ERROR with --quiet.
_PROGRESS = logging.getLogger("xattn_video.progress")


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """Raise the BrokenPipeError; rich would end the process without a word."""
        raise


def output_console() -> Console:
    """A console for results, on stdout; plain text if stdout is not a terminal."""
    return _Console(highlight=False, markup=False, emoji=False)


def message_console() -> Console:
    """A console for warnings and errors, on stderr."""
    return _Console(stderr=True, highlight=False, markup=False, emoji=False)


def progress_console() -> Console:
    """A console for progress, on stderr; silent with --quiet."""
    console = message_console()
    console.quiet = not _PROGRESS.isEnabledFor(logging.WARNING)
    return console


def print_message(text: str) -> None:
    """Print a line of progress on stderr, without line breaks."""
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
    """Print on stderr that the run was interrupted, by what, and what was done until then."""
    text = f"interrupted{by and f' by {by}'}{done and f'; {done}'}."
    message_console().print(text, soft_wrap=True)


def written_name(path: Path, *, replaced: bool) -> str:
    """The name of a written file, and whether it took another one's place."""
    return f"{path} (replaced)" if replaced else str(path)


def print_labelled(console: Console, lines: dict[str, str]) -> None:
    """Print one line for each label; a terminal wraps it, a file keeps it whole."""
    for label, text in lines.items():
        console.print(Text.assemble((f"{label:<11}", "bold"), text), soft_wrap=True)


def expands_paths(command: Callable[P, T]) -> Callable[P, T]:
    """The command with ~ and $VARIABLES expanded in all path arguments."""

    @functools.wraps(command)
    def run(*args: P.args, **options: P.kwargs) -> T:
        try:
            expanded: Any = {name: _expanded(value) for name, value in options.items()}
        except ValueError as error:
            raise typer.BadParameter(str(error)) from None
        return command(*args, **expanded)

    return run


def _expanded(value: Any) -> Any:
    """The expanded path or list of paths; other values unchanged."""
    if isinstance(value, list):
        return [_expanded(part) for part in value]
    return user_path(value) if isinstance(value, Path) else value


def as_typed(text: str) -> str:
    """The message with names of arguments replaced by the running command's options.

    A name of one word is replaced only if the message is about its value, or in a list of
    options. Messages about --setting keep their names.
    """
    options = TYPED_OPTIONS.get() or {}
    if text.startswith("--setting "):
        return text
    for name, typed in options.items():
        about = r"(?!\w)" if "_" in name else r"(?=( must| lies| cannot be written)\b|=)"
        text = re.sub(rf"(?<![\w./'-]){name}{about}", typed, text)
    return re.sub(r"[\w-]+(, [\w-]+)+", partial(_list_as_typed, options), text)


def _list_as_typed(options: Mapping[str, str], found: re.Match[str]) -> str:
    """The list with names replaced by options, if some of its words are options."""
    words = found[0].split(", ")
    if not any(word in options.values() for word in words):
        return found[0]
    return ", ".join(options.get(word, word) for word in words)


def log_choices(verbose: bool, quiet: bool = False) -> None:
    """Set up logging for a command.

    ``verbose`` logs the choices of this package; otherwise even the hub's retries are hidden.
    ``quiet`` hides all progress, that of downloads included.
    """
    _PROGRESS.setLevel(logging.ERROR if quiet else logging.NOTSET)
    if quiet:
        from huggingface_hub.utils import disable_progress_bars  # type: ignore[attr-defined]

        disable_progress_bars()
    logging.getLogger("xattn_video").setLevel(logging.INFO if verbose else logging.NOTSET)
    if verbose:
        logging.basicConfig(level=logging.WARNING, format="%(name)s: %(message)s")
    else:
        # The hub's own function, because its first import resets the level of its logger.
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
