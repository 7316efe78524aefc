"""Progress of a generation: a bar on a terminal, a few plain lines elsewhere."""

from types import TracebackType
from typing import Protocol

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Column


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


class GenerationProgress:
    """Shows the steps of one generation; call it with each finished step."""

    def __init__(self, console: Console, title: str, steps: int) -> None:
        self._console = console
        self._title = title
        # A narrow terminal takes room from the bar, not from the figures.
        uncut = Column(no_wrap=True)
        self._progress = Progress(
            SpinnerColumn(),
            BarColumn(bar_width=None, table_column=Column(ratio=1)),
            MofNCompleteColumn(table_column=uncut),
            TextColumn("{task.fields[phase]}", table_column=uncut),
            TimeElapsedColumn(table_column=uncut),
            TimeRemainingColumn(table_column=uncut),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task = self._progress.add_task("", total=steps, phase="reading the prompt")

    def __enter__(self) -> "GenerationProgress":
        # A line of its own: beside the bar it would leave an 80-column terminal no room for times.
        self._console.print(self._title, soft_wrap=True)
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._progress.stop()

    def __call__(self, step: FinishedStep) -> None:
        done = step.index + 1
        phase = step.kind
        if phase == "sparse" and step.density is not None:
            phase = f"sparse, density {step.density:.2f}"
        if self._console.is_terminal:
            phase = "decoding the video" if done == step.total else phase
            self._progress.update(self._task, completed=done, phase=phase)
        elif done * 10 // step.total > step.index * 10 // step.total:
            self._console.print(f"  step {done}/{step.total}  {phase}  {step.seconds:.2f} s")
