"""Where the command line writes, and how it reports what went wrong."""

import logging
import sys
import traceback
import warnings
from collections.abc import Iterable
from types import TracebackType
from typing import Any, cast

import typer
import typer.core
from rich.console import Console
from rich.text import Text

from xattn_video.errors import BackendUnavailableError, XAttentionError

BAD_ARGUMENT = 2
FAILED = 1
# What a shell reports of a command that Ctrl-C ended.
INTERRUPTED = 130
# Typer brings click along in some releases and depends on it in others.
_UsageError = cast("type[Exception]", typer.BadParameter.__mro__[1])
# A backend that cannot run is an argument too: "auto" always finds one.
_BAD_ARGUMENTS = (ValueError, TypeError, BackendUnavailableError)


def output_console() -> Console:
    """Results, on stdout; plain text where that is no terminal."""
    return Console(highlight=False, markup=False, emoji=False)


def message_console() -> Console:
    """Progress, warnings and errors, on stderr."""
    return Console(stderr=True, highlight=False, markup=False, emoji=False)


def print_warning(text: str) -> None:
    """One warning on stderr."""
    message_console().print(Text.assemble(("warning: ", "yellow"), text), soft_wrap=True)


def print_warnings(texts: Iterable[str]) -> None:
    """Each of them."""
    for text in texts:
        print_warning(text)


def print_error(text: str) -> None:
    """What went wrong, on stderr."""
    message_console().print(Text.assemble(("error: ", "bold red"), text), soft_wrap=True)


def print_interruption(done: str = "") -> None:
    """That Ctrl-C was pressed and what was done until then, on stderr."""
    message_console().print(f"interrupted; {done}." if done else "interrupted.", soft_wrap=True)


def print_labelled(console: Console, lines: dict[str, str]) -> None:
    """One line for each label; a terminal wraps it, a file keeps it whole."""
    for label, text in lines.items():
        console.print(Text.assemble((f"{label:<11}", "bold"), text), soft_wrap=True)


class _OneLineUsageErrors:
    """Says in one line, too, what is wrong with the words that a command was given."""

    def main(self, *args: Any, **options: Any) -> Any:
        """Run the command and exit, unless ``standalone_mode`` is False."""
        exits = options.pop("standalone_mode", True)
        options["standalone_mode"] = False
        run = super().main  # type: ignore[misc]
        if not exits:
            return run(*args, **options)
        try:
            code = run(*args, **options)
        except _UsageError as error:
            print_error(_describe_usage(error))
            sys.exit(BAD_ARGUMENT)
        except typer.Abort:
            print_interruption()
            sys.exit(INTERRUPTED)
        sys.exit(code if isinstance(code, int) else 0)


class OneLineErrors(_OneLineUsageErrors, typer.core.TyperGroup):
    """A group of commands."""


class OneLineCommand(_OneLineUsageErrors, typer.core.TyperCommand):
    """A command by itself."""


def _describe_usage(error: Any) -> str:
    text = error.format_message()
    command = "xattn-video" if error.ctx is None else error.ctx.command_path
    return f"{text if text.endswith(('.', '?')) else f'{text}.'} See {command} --help."


class ErrorsToExitCodes:
    """Within it an exception becomes one line on stderr and an exit code, and Ctrl-C does too.

    The text of a KeyboardInterrupt, where it has one, is what was done until then.

    Args:
        verbose: Print the traceback too.

    Attributes:
        running: Set it once the arguments have proved sound: a ValueError is then a failure.
    """

    def __init__(self, verbose: bool) -> None:
        self.verbose = verbose
        self.running = False

    def __enter__(self) -> "ErrorsToExitCodes":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if isinstance(error, KeyboardInterrupt):
            print_interruption(str(error))
            raise typer.Exit(INTERRUPTED) from None
        if not isinstance(error, Exception) or isinstance(error, typer.Exit):
            return
        if self.verbose:
            sys.stderr.write("".join(traceback.format_exception(kind, error, trace)))
        print_error(describe(error))
        bad_argument = not self.running and isinstance(error, _BAD_ARGUMENTS)
        raise typer.Exit(BAD_ARGUMENT if bad_argument else FAILED) from None


def describe(error: Exception) -> str:
    """What to tell a user: our own words as they are, another library's on one line."""
    text = str(error)
    if isinstance(error, XAttentionError):
        # A backend names its remedy as Python has it; here it is an option.
        return text.replace('backend "auto"', "--backend auto")
    text = " ".join(text.split())
    if isinstance(error, ValueError | TypeError | RuntimeError | OSError) and text:
        return text
    return f"{type(error).__name__}: {text}; run again with --verbose for the traceback."


def log_choices(verbose: bool) -> None:
    """Log what this package chooses if ``verbose``; else not even the hub's retries."""
    if verbose:
        logging.basicConfig(level=logging.WARNING, format="%(name)s: %(message)s")
        logging.getLogger("xattn_video").setLevel(logging.INFO)
    else:
        # By its own function: it sets its logger's level anew when it is first imported.
        from huggingface_hub.utils import logging as hub_logging

        hub_logging.set_verbosity(logging.ERROR)


def quiet_libraries() -> None:
    """Keep Diffusers' and Transformers' advice and bars off the terminal; downloads still show."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    warnings.simplefilter("ignore")
    for library in (diffusers_logging, transformers_logging):
        library.set_verbosity_error()
        library.disable_progress_bar()
