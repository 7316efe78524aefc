"""A self-contained web page of a run: synchronised videos, curves, heat maps and tables."""

import base64
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from xattn_video.reporting.pages import render
from xattn_video.reporting.tables import Table

_FOLDER = Path(__file__).parent / "web"
# Size of a curve in SVG units; CSS sets the pixels.
_HEIGHT = 100
_WIDTH = 1000


@dataclass(frozen=True, slots=True)
class Figure:
    """A number to highlight, what it is, and what it means."""

    value: str
    label: str
    note: str = ""

    @property
    def line(self) -> str:
        """The figure as a line for a terminal."""
        return f"{self.value} {self.label}{self.note and f'; {self.note}'}"


@dataclass(frozen=True, slots=True)
class Curve:
    """A measure by frame.

    Attributes:
        name, unit: Name and unit, such as "PSNR" and "dB".
        values: One value for each frame.
        digits: Digits after the decimal point.
        cap: The value of an identical frame.
    """

    name: str
    unit: str
    values: tuple[float, ...]
    digits: int
    cap: float

    def __post_init__(self) -> None:
        if not self.values:
            raise ValueError(f"a curve needs a value, got none for {self.name}; leave it out.")

    @property
    def limits(self) -> tuple[float, float]:
        """Round limits of the axis; identical frames, which would stretch it, do not count."""
        shown = [value for value in self.values if value < self.cap] or [self.cap]
        return round_limits(min(shown), max(shown), self.digits)

    @property
    def points(self) -> str:
        """The points of an SVG polyline, 1000 wide and 100 high."""
        low, high = self.limits
        last = max(1, len(self.values) - 1)
        heights = [(min(value, high) - low) / (high - low) for value in self.values]
        return " ".join(
            f"{_WIDTH * number / last:.1f},{_HEIGHT * (1 - height):.1f}"
            for number, height in enumerate(heights)
        )

    @property
    def summary(self) -> str:
        """The mean and the worst frame as text, for people who cannot see the curve."""
        if min(self.values) >= self.cap:
            return f"{self.name}: every frame is identical"
        worst = min(range(len(self.values)), key=self.values.__getitem__)
        mean = sum(self.values) / len(self.values)
        return (
            f"{self.name} by frame: mean {self.text(mean)}, "
            f"lowest {self.text(self.values[worst])} at frame {worst + 1}"
        )

    def text(self, value: float) -> str:
        """A value with its unit."""
        return f"{value:.{self.digits}f}{f' {self.unit}' if self.unit else ''}"

    @property
    def texts(self) -> list[str]:
        """The value of every frame, with its unit."""
        return ["identical" if value >= self.cap else self.text(value) for value in self.values]


@dataclass(frozen=True, slots=True)
class Player:
    """Synchronised videos: one file holds their pictures side by side.

    Attributes:
        title: The title, different from those of the other players.
        labels: One label for each picture, left to right.
        video: A WebM file, ``len(labels) * width`` by ``height`` pixels.
        width, height: Size of one picture, in pixels.
        num_frames, fps: Length and frame rate of the video.
        curves: Measures by frame.
    """

    title: str
    labels: tuple[str, ...]
    video: bytes
    width: int
    height: int
    num_frames: int
    fps: float
    curves: tuple[Curve, ...] = ()

    @property
    def data(self) -> str:
        """The file as base64."""
        return base64.b64encode(self.video).decode()


@dataclass(frozen=True, slots=True)
class HeatMap:
    """Density by layer and step.

    Attributes:
        title: The title, different from those of the other maps.
        cells: ``[layers][steps]``: a density, or text for a cell that is not sparse.
    """

    title: str
    cells: Sequence[Sequence[float | str]]

    @property
    def limits(self) -> tuple[float, float]:
        """The multiples of 0.1 around all densities."""
        found = [cell for row in self.cells for cell in row if not isinstance(cell, str)]
        if not found:
            return 0.0, 1.0
        low, high = round_limits(min(found), max(found), digits=1)
        # No density is above 1.
        return min(low, 0.9), min(high, 1.0)

    @property
    def shaded(self) -> list[list[tuple[float | None, str]]]:
        """Each cell's shade, 0 at the lower limit and 1 at the upper one, and its text."""
        low, high = self.limits
        return [
            [
                (None, cell)
                if isinstance(cell, str)
                else ((cell - low) / (high - low), f"density {cell:.3f}")
                for cell in row
            ]
            for row in self.cells
        ]

    @property
    def has_dense(self) -> bool:
        """Whether a cell is not sparse."""
        return any(isinstance(cell, str) for row in self.cells for cell in row)


@dataclass(frozen=True, slots=True)
class Picture:
    """A PNG and a description."""

    caption: str
    png: bytes

    @property
    def data(self) -> str:
        """The file as base64."""
        return base64.b64encode(self.png).decode()


@dataclass(frozen=True, slots=True)
class WebPage:
    """The content of a page, from top to bottom; empty parts are omitted.

    Attributes:
        title, lead: The heading and a sentence below it.
        figures: The most important results.
        players, heat_maps: One is shown at a time; a list selects it.
        tables, facts: Pairs of a heading and a table, or a heading and text by label.
        pictures: Plots.
        notes: Remarks for the reader.
        command: The command that made the results.
    """

    title: str
    lead: str
    figures: tuple[Figure, ...] = ()
    players: tuple[Player, ...] = ()
    heat_maps: tuple[HeatMap, ...] = ()
    tables: tuple[tuple[str, Table], ...] = ()
    facts: tuple[tuple[str, dict[str, str]], ...] = ()
    pictures: tuple[Picture, ...] = ()
    notes: tuple[str, ...] = ()
    command: str = ""

    def html(self) -> str:
        """The page, which needs no other file and no network."""
        parts = {
            name: (_FOLDER / f"page.{name}").read_text(encoding="utf-8") for name in ("css", "js")
        }
        return render(_FOLDER / "page.html.jinja", page=self, **parts)

    def markdown(self) -> str:
        """The text of the page: heading, lead, tables and notes."""
        parts = [f"# {self.title}", self.lead]
        parts += [f"## {heading}\n\n{table.markdown()}" for heading, table in self.tables]
        parts += ["\n".join(f"- {note}" for note in self.notes)] * bool(self.notes)
        return "\n\n".join(parts) + "\n"


def round_limits(low: float, high: float, digits: int) -> tuple[float, float]:
    """Round numbers around both, at least one unit of the last shown digit apart."""
    least = 10.0**-digits
    step = 10 ** math.floor(math.log10(max(high - low, 2 * least)))
    step = max(least, step / 2 if high - low < 2 * step else step)
    floor, ceil = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return floor * step, max(ceil, floor + 1) * step
