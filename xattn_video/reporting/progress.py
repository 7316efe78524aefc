"""Progress of a whole job: one bar on a terminal, a few plain lines elsewhere, one time left."""

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
"""Kinds of work beside the denoising steps, which are named by what they are."""


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
    """Estimates the seconds left from what is left of each kind of work, and its measured times.

    A step of a kind that has not run yet is taken for a median step. Other work counts once it was
    measured, and decoding before that by a guess: `is_complete` tells whether all of it counts.

    Args:
        decoding_steps: Steps that decoding takes as long as, until one was measured; None if
            nobody knows.
        clock: Tells the seconds.
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
        """Take off work that will not come."""
        for kind, count in units.items():
            self._left[kind] -= count  # type: ignore[assignment]

    def begin(self, kind: str, units: float = 1) -> None:
        """Some work of a kind begins now."""
        self.current, self._units, self._since = kind, units, self.clock()

    @property
    def spent(self) -> float:
        """Seconds since what runs now began."""
        return self.clock() - self._since

    def end(self) -> None:
        """It ends."""
        self.measured(self.current, self.spent, self._units)
        self.current = ""

    def measured(self, kind: str, seconds: float, units: float = 1) -> None:
        """Some work of a kind took so long; it is no longer left."""
        self._times[kind].append(seconds / units)
        self._left[kind] -= units  # type: ignore[assignment]

    @property
    def is_complete(self) -> bool:
        """Whether all that is left has a time, measured or guessed."""
        return all(self._of_one(kind) is not None for kind in self._kinds)

    def seconds(self) -> float | None:
        """The seconds left; None before the first step."""
        if self._of_one("dense") is None:
            return None
        total = 0.0
        for kind in self._kinds:
            one = self._of_one(kind) or 0.0
            seconds = self._left[kind] * one
            if kind == self.current:
                # What takes longer than expected is never all but done.
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
            # The first step and the text were shown, and waited for, together.
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
        """The frames are there, or it failed: forget what else was expected of it."""
        writing = next((kind for kind in self.units if kind.startswith(WRITING)), None)
        if done and self._left.current == DECODING:
            self._left.end()
            self.units[DECODING] -= self._videos
        units = self.units.pop(writing) if done and writing is not None else 0
        self._left.drop(self.units)
        if units and writing is not None:
            self._job.begin_writing(writing, units)

    def _expected(self, kind: str) -> str:
        """A kind of step, or another that was expected in its place."""
        named = kind + self._suffix if kind == "sparse" else kind
        if self.units[named] > 0:
            return named
        steps = (name for name, count in self.units.items() if count > 0 and _is_step(name))
        return next(steps, named)


class JobProgress:
    """One display for a whole job: loading, then text, steps, decoding and writing of each run.

    Args:
        console: Where it is shown.
        left: What is left, and how long that takes.
    """

    def __init__(self, console: Console, left: TimeLeft | None = None) -> None:
        self._console = console
        self.left = left or TimeLeft()
        self._is_writing = False
        self._progress: Progress | None = None
        self._began = self.left.clock()
        self._phase = ""

    def expect(self, runs: Iterable[Mapping[str, float]]) -> None:
        """Announce the work of runs, as `run` gets it."""
        for units in runs:
            self.left.expect(units)

    def load(self, model: str, *, downloads: bool) -> None:
        """The model is being loaded; a bar of ours would hide those of a download."""
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
        """Make room for results; the display comes back with the next run."""
        self._stop()
        yield

    @contextmanager
    def run(
        self, title: str, units: Mapping[str, float], videos: int = 1, prefix: str = ""
    ) -> Iterator[RunProgress]:
        """One call of the pipeline, which makes ``videos`` together.

        Args:
            title: What is generated.
            units: Its work by kind, from `ExpectedWork`, with what follows it under a kind that
                begins with "writing".
            videos: How many are made in the call.
            prefix: Put before the title.
        """
        self._end_writing()
        # A line of its own: beside the bar it would leave an 80-column terminal no room for times.
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
        """A step is done."""
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
        """The frames of a run are there."""
        self._is_writing = True
        self.left.begin(kind, units)
        self._show(kind)

    def describe(self) -> str:
        """The time left: "about" as far as one can tell, "over" if part of it is unknown."""
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
        # A narrow terminal takes room from the bar, not from the figures.
        uncut = Column(no_wrap=True)
        progress = Progress(
            SpinnerColumn(),
            _JobBar(self),
            TextColumn("{task.fields[phase]}", table_column=uncut),
            TimeElapsedColumn(table_column=uncut),
            _JobTimeLeft(self),
            console=self._console,
            transient=True,
            # Results on stdout stay there, whatever stderr is.
            redirect_stdout=False,
        )
        progress.add_task("", total=None, phase=self._phase)
        # The job's own time, not the time since the display last came back.
        progress.tasks[0].start_time = progress.get_time() - (self.left.clock() - self._began)
        return progress

    def _stop(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def share(self) -> float | None:
        """The share of the job's time that is over; None where nobody knows."""
        left = self.left.seconds()
        if left is None:
            return None
        spent = self.left.clock() - self._began
        return spent / max(spent + left, 1e-9)


class _JobBar(BarColumn):
    """The share of the job that is done, by time."""

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
    """The time left of the whole job."""

    def __init__(self, job: JobProgress) -> None:
        super().__init__(table_column=Column(no_wrap=True))
        self._job = job

    def render(self, task: Task) -> Text:
        return Text(self._job.describe(), style="progress.remaining")


def _is_step(kind: str) -> bool:
    return kind.startswith(("dense", "sparse", "refresh"))
