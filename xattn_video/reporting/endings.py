"""How a command ends: errors and signals become one line on stderr and an exit code."""

import contextlib
import io
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from types import FrameType, TracebackType
from typing import Any, NoReturn, cast

import typer
import typer.core

from xattn_video.errors import (
    BackendUnavailableError,
    MissingPackageError,
    PipelineLoadError,
    XAttentionError,
)
from xattn_video.reporting.console import print_error, print_interruption

REFUSED = 2
FAILED = 1
# The exit code of shells after Ctrl-C: 128 + 2. Other signals have 128 + their number.
INTERRUPTED = 130
_ENDING_SIGNALS = [
    getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)
]
_PATIENCE_SECONDS = 5.0
_VERBOSE_ADVICE = "; run again with --verbose for the traceback."
# Some releases of typer vendor click and others depend on it; this works with both.
_UsageError = cast("type[Exception]", typer.BadParameter.__mro__[1])
# What is unusable or missing before anything runs is refused, as a bad argument is.
_REFUSALS = (
    ValueError,
    TypeError,
    BackendUnavailableError,
    MissingPackageError,
    PipelineLoadError,
    FileNotFoundError,
)


class _OneLineUsageErrors:
    """Prints usage errors of a command line in one line too."""

    def main(self, *args: Any, **options: Any) -> Any:
        """Run the command and exit, unless ``standalone_mode`` is False."""
        exits = options.pop("standalone_mode", True)
        options["standalone_mode"] = False
        _open_closed_streams()
        run = super().main  # type: ignore[misc]
        if not exits:
            return run(*args, **options)
        try:
            with _whole_output():
                code = run(*args, **options)
                # After a reported failure, incomplete output is not worth another error.
                if not code:
                    sys.stdout.flush()
        except BrokenPipeError:
            # The reader of a pipe has closed it.
            sys.exit(FAILED)
        except OSError as error:
            print_error(_describe_printing(error))
            sys.exit(FAILED)
        except _UsageError as error:
            print_error(_describe_usage(error))
            sys.exit(REFUSED)
        except typer.Abort:
            print_interruption()
            sys.exit(INTERRUPTED)
        sys.exit(code if isinstance(code, int) else 0)


@contextlib.contextmanager
def _whole_output() -> Iterator[None]:
    """Let stdout raise OSError inside if it cannot write everything.

    With PYTHONUNBUFFERED, which containers often set, Python silently drops what does not fit on
    a full disk.
    """
    printed = sys.stdout
    raw = getattr(printed, "buffer", None)
    if isinstance(raw, io.RawIOBase):
        buffer = io.BufferedWriter(raw)
        sys.stdout = io.TextIOWrapper(
            buffer, printed.encoding, printed.errors, line_buffering=True
        )
    try:
        yield
    finally:
        try:
            sys.stdout.flush()
        except OSError:
            # Otherwise the rest of the buffer would fail again when Python ends.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _open_closed_streams() -> None:
    """Give Python a stdout and a stderr if the caller has closed them; what is printed is lost."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            nowhere = io.BufferedWriter(io.FileIO(os.devnull, "w"))
            setattr(sys, name, io.TextIOWrapper(nowhere, encoding="utf-8"))


def _describe_printing(error: OSError) -> str:
    if isinstance(error, BrokenPipeError):
        return (
            "the run ended early because the reader of its output did; let it read to the end, "
            "or print into a file."
        )
    return f"not all results could be printed: {error.strerror}; free space, or print elsewhere."


def _printing_failure(error: Exception) -> str:
    """The text of an error of stdout, which still holds what it could not write; else ""."""
    if isinstance(error, OSError) and not isinstance(error, XAttentionError):
        try:
            sys.stdout.flush()
        except OSError:
            return _describe_printing(error)
    return ""


class OneLineErrors(_OneLineUsageErrors, typer.core.TyperGroup):
    """A group of commands."""


class OneLineCommand(_OneLineUsageErrors, typer.core.TyperCommand):
    """A command by itself."""


def _describe_usage(error: Any) -> str:
    text = error.format_message()
    command = "xattn-video" if error.ctx is None else error.ctx.command_path
    return f"{text if text.endswith(('.', '?')) else f'{text}.'} See {command} --help."


class Terminated(KeyboardInterrupt):
    """A signal asked the command to end. It stops as on Ctrl-C and leaves no partial files."""

    number = signal.SIGTERM


def _terminate(number: int, frame: FrameType | None) -> NoReturn:
    for ending in _ENDING_SIGNALS:
        # A repeated signal must not interrupt the cleanup.
        signal.signal(ending, signal.SIG_IGN)
    Terminated.number = signal.Signals(number)
    if hasattr(signal, "setitimer"):
        # A library's `except:` or a finaliser may swallow it, so it is raised again periodically.
        signal.signal(signal.SIGALRM, _say_again)
        signal.setitimer(signal.ITIMER_REAL, _PATIENCE_SECONDS, _PATIENCE_SECONDS)
    raise Terminated


def _say_again(number: int, frame: FrameType | None) -> NoReturn:
    raise Terminated


def _own_text(error: BaseException, text: str) -> str:
    return text


@contextlib.contextmanager
def finishing_first() -> Iterator[None]:
    """Delay SIGTERM and SIGHUP until the block inside has ended."""
    came: list[int] = []
    previous = {
        number: signal.signal(number, lambda number, frame: came.append(number))
        for number in _ENDING_SIGNALS
    }
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    if came:
        signal.raise_signal(came[0])


class ErrorsToExitCodes:
    """Turns an exception into one line on stderr and an exit code.

    The same holds for Ctrl-C, SIGTERM (sent by slurm, docker and others) and SIGHUP (a closed
    terminal). The text of a KeyboardInterrupt, if any, says what was done until then.

    Args:
        verbose: Print the traceback too.
        judge: Function from an error and its text ("" for an interruption) to the text to print;
            among several processes, another one may have failed first.

    Attributes:
        running: Set this when all arguments have been checked: from then on a ValueError is a
            failure of the run, not a wrong argument.
    """

    def __init__(
        self, verbose: bool, judge: Callable[[BaseException, str], str] = _own_text
    ) -> None:
        self.verbose = verbose
        self._judge = judge
        self.running = False
        self._handled: list[signal.Signals] = []

    def __enter__(self) -> "ErrorsToExitCodes":
        if threading.current_thread() is threading.main_thread():
            for number in _ENDING_SIGNALS:
                # A signal that the caller ignores (as nohup does) or handles is left alone.
                if signal.getsignal(number) == signal.SIG_DFL:
                    signal.signal(number, _terminate)
                    self._handled.append(number)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if isinstance(error, Terminated) and hasattr(signal, "setitimer"):
            signal.setitimer(signal.ITIMER_REAL, 0)
        for number in self._handled:
            # A launcher ends all processes when one has failed; this one prints why first.
            signal.signal(number, signal.SIG_DFL if error is None else signal.SIG_IGN)
        try:
            self._report(error)
        finally:
            for number in self._handled:
                signal.signal(number, signal.SIG_DFL)

    def _report(self, error: BaseException | None) -> None:
        """Print an error, and raise typer.Exit with its exit code."""
        if isinstance(error, KeyboardInterrupt):
            cause = self._judge(error, "")
            if cause:
                print_error(cause)
                raise typer.Exit(FAILED) from None
            if isinstance(error, Terminated):
                print_interruption(str(error), error.number.name)
                raise typer.Exit(128 + error.number) from None
            print_interruption(str(error))
            raise typer.Exit(INTERRUPTED) from None
        if not isinstance(error, Exception) or isinstance(error, typer.Exit):
            return
        if isinstance(error, BrokenPipeError) and not self.running:
            # As after `| head`.
            return
        if self.verbose:
            sys.stderr.write("".join(traceback.format_exception(error)))
        print_error(self._judge(error, _printing_failure(error) or describe(error)))
        # Models are loaded before anything else runs.
        refused = isinstance(error, PipelineLoadError) or (
            not self.running and isinstance(error, _REFUSALS)
        )
        raise typer.Exit(REFUSED if refused else FAILED) from None


def _without_advice(error: BaseException, text: str) -> str:
    """The text without the advice to use --verbose, which scripts lack."""
    return text.removesuffix(_VERBOSE_ADVICE)


def run_script(main: Callable[[], int | None]) -> NoReturn:
    """Run the main function of a benchmark or script, and exit as a command does.

    An error that a user can fix becomes one line; other errors are printed with their traceback.
    """
    try:
        with ErrorsToExitCodes(verbose=False, judge=_without_advice) as errors:
            errors.running = True
            try:
                code = main()
            except Exception as error:
                errors.verbose = not isinstance(error, OSError | ValueError | XAttentionError)
                raise
    except typer.Exit as ended:
        code = ended.exit_code
    sys.exit(code or 0)


def describe(error: Exception) -> str:
    """The text of an error for the user: unchanged for our own errors, else on one line."""
    text = str(error)
    if isinstance(error, XAttentionError):
        # Backends name their remedy as a Python argument; here it is an option.
        return text.replace('backend "auto"', "--backend auto")
    text = " ".join(text.split())
    if isinstance(error, ValueError | TypeError | RuntimeError | OSError) and text:
        return text
    return f"{type(error).__name__}: {text}{_VERBOSE_ADVICE}"
