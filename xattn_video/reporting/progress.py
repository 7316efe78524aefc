"""Progress of a whole job with the time left: a bar on a terminal, a few plain lines elsewhere."""

import statistics
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Protocol

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
)
from rich.progress_bar import ProgressBar
from rich.table import Column
from rich.text import Text

TEXT, DECODING, WRITING = "text", "decoding", "writing"
"""Kinds of work other than denoising steps, whose kinds are "dense", "sparse" and "refresh"."""


class FinishedStep(Protocol):
    """A finished denoising step: its number, from 0, and whether it was dense or sparse."""

    @property
    def index(self) -> int: ...
    @property
    def total(self) -> int: ...
    @property
    def kind(self) -> str: ...
    @property
    def seconds(self) -> float: ...
    @property
    def density(self) -> float | None: ...


class TimeLeft:
    """Estimates the seconds left from the work left of each kind, and its measured times.

    A kind of step that has not run yet is assumed to take as long as the median step. Other work
    counts only once it was measured, but decoding has a guess before that. `is_complete` tells
    whether all work that is left counts.

    Args:
        decoding_steps: Guess of the number of steps that take as long as decoding; None if
            unknown.
        clock: Function that returns the time in seconds.
    """

    def __init__(
        self,
        decoding_steps: float | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.clock = clock
        self._left: Counter[str] = Counter()
        self._times: defaultdict[str, list[float]] = defaultdict(list)
        self.current, self._units, self._since = "", 1.0, clock()
        self.decoding_steps = decoding_steps

    def expect(self, units: Mapping[str, float]) -> None:
        """Add work, by kind."""
        self._left.update(units)

    def drop(self, units: Mapping[str, float]) -> None:
        """Remove work that will not be done."""
        for kind, count in units.items():
            self._left[kind] -= count  # type: ignore[assignment]

    def begin(self, kind: str, units: float = 1) -> None:
        """Start timing some work of a kind."""
        self.current, self._units, self._since = kind, units, self.clock()

    @property
    def spent(self) -> float:
        """Seconds since the current work began."""
        return self.clock() - self._since

    def end(self) -> None:
        """Record that the current work has ended."""
        self.measured(self.current, self.spent, self._units)
        self.current = ""

    def measured(self, kind: str, seconds: float, units: float = 1) -> None:
        """Record the seconds of some work of a kind, which is then no longer left."""
        self._times[kind].append(seconds / units)
        self._left[kind] -= units  # type: ignore[assignment]

    @property
    def is_complete(self) -> bool:
        """Whether all work that is left has a time, measured or guessed."""
        return all(self._of_one(kind) is not None for kind in self._kinds)

    def seconds(self) -> float | None:
        """The seconds left; None before the time of a step is known."""
        if self._of_one("dense") is None:
            return None
        total = 0.0
        for kind in self._kinds:
            one = self._of_one(kind) or 0.0
            seconds = self._left[kind] * one
            if kind == self.current:
                # Work that takes longer than expected keeps at least 10% of its time so far left.
                seconds += max(-self.spent, 0.1 * self.spent - self._units * one)
            total += seconds
        return max(total, 0.0)

    @property
    def _kinds(self) -> list[str]:
        return [kind for kind, count in self._left.items() if count > 0]

    def _of_one(self, kind: str) -> float | None:
        """Seconds of one unit."""
        if self._times[kind]:
            return statistics.median(self._times[kind])
        if kind == DECODING and self.decoding_steps is not None:
            step = self._of_one("dense")
            return None if step is None else self.decoding_steps * step
        if kind == TEXT or kind.startswith((DECODING, WRITING)):
            return None
        steps = [s for name, seconds in self._times.items() if _is_step(name) for s in seconds]
        return statistics.median(steps) if steps else None


class RunProgress:
    """Shows the steps of one call of the pipeline; call it with each finished step."""

    def __init__(self, job: "JobProgress", units: Mapping[str, float], videos: int) -> None:
        self._job, self._left = job, job.left
        self.units = Counter(units)
        self._videos = videos
        self._suffix = next((kind[6:] for kind in units if kind.startswith("sparse, ")), "")
        self._left.begin(TEXT, videos)

    def __call__(self, step: FinishedStep) -> None:
        left, videos = self._left, self._videos
        if step.index == 0:
            # The text and the first step are one phase of the display; their times are separate.
            left.measured(TEXT, max(0.0, left.spent - step.seconds), videos)
            self.units[TEXT] -= videos
        kind = self._expected(step.kind)
        left.measured(kind, step.seconds, videos)
        self.units[kind] -= videos
        last = step.index + 1 == step.total
        upcoming = kind if self.units[kind] > 0 else self._expected("sparse")
        left.begin(DECODING if last else upcoming, videos)
        self._job.show_step(step)

    def finish(self, done: bool) -> None:
        """Drop the expected work that is left, after the frames are done or the call failed."""
        writing = next((kind for kind in self.units if kind.startswith(WRITING)), None)
        if done and self._left.current == DECODING:
            self._left.end()
            self.units[DECODING] -= self._videos
        units = self.units.pop(writing) if done and writing is not None else 0
        self._left.drop(self.units)
        if units and writing is not None:
            self._job.begin_writing(writing, units)

    def _expected(self, kind: str) -> str:
        """The expected kind of a step, or another expected kind if there is none of it left."""
        named = kind + self._suffix if kind == "sparse" else kind
        if self.units[named] > 0:
            return named
        steps = (name for name, count in self.units.items() if count > 0 and _is_step(name))
        return next(steps, named)


class JobProgress:
    """One display for a whole job: loading, then text, steps, decoding and writing of each run.

    Args:
        console: The console of the display.
        left: The estimate of the time left.
    """

    def __init__(self, console: Console, left: TimeLeft | None = None) -> None:
        self._console = console
        self.left = left or TimeLeft()
        self._is_writing = False
        self._progress: Progress | None = None
        self._began = self.left.clock()
        self._phase = ""

    def expect(self, runs: Iterable[Mapping[str, float]]) -> None:
        """Announce the units of work of runs; `run` takes the same units."""
        for units in runs:
            self.left.expect(units)

    def load(self, model: str, *, downloads: bool) -> None:
        """Show that the model is being loaded; no bar with downloads, which have their own."""
        self._console.print(f"loading {model}", soft_wrap=True)
        if not downloads:
            self._show("loading")

    @contextmanager
    def running(self) -> Iterator["JobProgress"]:
        """Show the display until the job ends."""
        try:
            yield self
        finally:
            self._end_writing()
            self._stop()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Hide the display to print results; it returns with the next run."""
        self._stop()
        yield

    @contextmanager
    def run(
        self, title: str, units: Mapping[str, float], videos: int = 1, prefix: str = ""
    ) -> Iterator[RunProgress]:
        """Show one call of the pipeline, which makes ``videos`` videos together.

        Args:
            title: What is generated.
            units: Units of work by kind, from `ExpectedWork`; the work after decoding has a kind
                that begins with "writing".
            videos: Number of videos made in the call.
            prefix: Text before the title.
        """
        self._end_writing()
        # On a separate line, because 80 columns have no room for it beside the bar and times.
        self._console.print(prefix + title, soft_wrap=True)
        shown = RunProgress(self, units, videos)
        self._show("text, first step")
        done = False
        try:
            yield shown
            done = True
        finally:
            shown.finish(done)

    def show_step(self, step: FinishedStep) -> None:
        """Show a finished step."""
        done = step.index + 1
        phase = step.kind
        if phase == "sparse" and step.density is not None:
            phase = f"sparse, density {step.density:.2f}"
        if self._console.is_terminal:
            last = done == step.total
            self._show("decoding the video" if last else f"step {done}/{step.total} {phase}")
        elif done * 10 // step.total > step.index * 10 // step.total:
            left = self.describe()
            self._console.print(
                f"  step {done}/{step.total}  {phase}  {step.seconds:.2f} s  {left}".rstrip()
            )

    def begin_writing(self, kind: str, units: float) -> None:
        """Show that the files of a run are being written."""
        self._is_writing = True
        self.left.begin(kind, units)
        self._show(kind)

    def describe(self) -> str:
        """The time left as text: "about ... left", or "over ... left" if part of it is unknown."""
        seconds = self.left.seconds()
        if seconds is None:
            return ""
        left = timedelta(seconds=round(seconds))
        return f"{'about' if self.left.is_complete else 'over'} {left} left"

    def _end_writing(self) -> None:
        if self._is_writing:
            self.left.end()
            self._is_writing = False

    def _show(self, phase: str) -> None:
        self._phase = phase
        if not self._console.is_terminal or self._console.quiet:
            return
        if self._progress is None:
            self._progress = self._display()
            self._progress.start()
        self._progress.update(self._progress.task_ids[0], phase=phase)

    def _display(self) -> Progress:
        # On a narrow terminal the bar shrinks, not the figures.
        uncut = Column(no_wrap=True)
        progress = Progress(
            SpinnerColumn(),
            _JobBar(self),
            TextColumn("{task.fields[phase]}", table_column=uncut),
            TimeElapsedColumn(table_column=uncut),
            _JobTimeLeft(self),
            console=self._console,
            transient=True,
            # Results must stay on stdout, whatever stderr is.
            redirect_stdout=False,
        )
        progress.add_task("", total=None, phase=self._phase)
        # Elapsed time counts from the start of the job, not of this display.
        progress.tasks[0].start_time = progress.get_time() - (self.left.clock() - self._began)
        return progress

    def _stop(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def share(self) -> float | None:
        """The share of the job's time that has passed; None if unknown."""
        left = self.left.seconds()
        if left is None:
            return None
        spent = self.left.clock() - self._began
        return spent / max(spent + left, 1e-9)


class _JobBar(BarColumn):
    """A bar of the share of the job's time that has passed."""

    def __init__(self, job: JobProgress) -> None:
        super().__init__(bar_width=None, table_column=Column(ratio=1))
        self._job = job

    def render(self, task: Task) -> ProgressBar:
        share = self._job.share()
        return ProgressBar(
            total=None if share is None else 1.0,
            completed=share or 0.0,
            pulse=share is None,
            animation_time=task.get_time(),
        )


class _JobTimeLeft(ProgressColumn):
    """The time left for the whole job."""

    def __init__(self, job: JobProgress) -> None:
        super().__init__(table_column=Column(no_wrap=True))
        self._job = job

    def render(self, task: Task) -> Text:
        return Text(self._job.describe(), style="progress.remaining")


def _is_step(kind: str) -> bool:
    return kind.startswith(("dense", "sparse", "refresh"))
