"""One table that can be shown on a terminal, in Markdown and in HTML."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

from rich.console import Group, RenderableType
from rich.table import Table as RichTable

T = TypeVar("T")
_GAP = 2
_HTML = """<table>
<thead><tr>
{%- for heading, side in columns %}<th style="text-align: {{ side }}">{{ heading }}</th>
{%- endfor %}</tr></thead>
<tbody>
{%- for row in rows %}
<tr>
{%- for cell, side in row %}<td style="text-align: {{ side }}">{{ cell }}</td>{% endfor -%}
</tr>
{%- endfor %}
</tbody>
</table>"""


@dataclass(frozen=True, slots=True)
class Table:
    """A table of text cells.

    Attributes:
        columns: The headings.
        rows: The cells, as text; each row has one cell per column.
        num_left: Number of first columns that are aligned left; the others are aligned right.
    """

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    num_left: int = 1

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.columns):
                raise ValueError(
                    f"a table's rows must have a cell for each of its {len(self.columns)} "
                    f"columns, got {len(row)}: {row}; leave a cell empty instead."
                )

    @classmethod
    def of(
        cls,
        items: Iterable[T],
        columns: Mapping[str, Callable[[T], object]],
        *,
        num_left: int = 1,
        keep_empty: bool = True,
    ) -> "Table":
        """Make one row for each item with the function of each column; None is an empty cell.

        Args:
            items: The items, one per row.
            columns: Heading -> function from an item to its cell.
            num_left: See the class.
            keep_empty: Whether a column that has no text in any row stays.
        """
        items = list(items)
        cells = {name: [_text(cell(item)) for item in items] for name, cell in columns.items()}
        if not keep_empty:
            cells = {name: column for name, column in cells.items() if any(column)}
        return cls(tuple(cells), tuple(zip(*cells.values(), strict=True)), num_left)

    def turned(self) -> "Table":
        """The table with rows and columns exchanged, for few items with many columns."""
        lines = tuple(zip(*self.rows, strict=True))
        first, *others = zip(self.columns, lines, strict=True)
        return Table((first[0], *first[1]), tuple((heading, *cells) for heading, cells in others))

    def terminal(self, width: int) -> Group:
        """The table for a console ``width`` characters wide; print it with ``crop=False``.

        If the console is too narrow, the other columns follow below, beside the first column
        again. Headings and cells are never wrapped.
        """
        parts: list[RenderableType] = []
        for columns in self._fitting(width):
            table = RichTable(box=None, pad_edge=False, padding=(0, _GAP, 0, 0))
            table.width = self._width(columns)
            for column in columns:
                side = self._side(column)
                table.add_column(self.columns[column], justify=side, no_wrap=True)
            for row in self.rows:
                table.add_row(*(row[column] for column in columns))
            parts += ["", table] if parts else [table]
        return Group(*parts)

    def _fitting(self, width: int) -> list[list[int]]:
        """The columns of each part; every part has the first column and at least one other."""
        parts = [[0]]
        for column in range(1, len(self.columns)):
            if len(parts[-1]) > 1 and self._width([*parts[-1], column]) > width:
                parts.append([0])
            parts[-1].append(column)
        return parts

    def _width(self, columns: Sequence[int]) -> int:
        """Width of these columns side by side, in characters."""
        widths = [
            max(len(self.columns[column]), *(len(row[column]) for row in self.rows), 0)
            for column in columns
        ]
        # The last column has no gap to its right.
        return sum(widths) + _GAP * (len(columns) - 1)

    def markdown(self) -> str:
        """The table in GitHub's Markdown."""
        marks = ["---" if side == "left" else "---:" for _, side in self._sided(self.columns)]
        return "\n".join(
            f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |"
            for line in (self.columns, marks, *self.rows)
        )

    def html(self) -> str:
        """A `<table>`, its text escaped."""
        from jinja2 import Template

        return Template(_HTML, autoescape=True).render(
            columns=self._sided(self.columns), rows=[self._sided(row) for row in self.rows]
        )

    def _sided(self, cells: tuple[str, ...]) -> list[tuple[str, str]]:
        """Each cell with the side it is aligned to."""
        return [(cell, self._side(number)) for number, cell in enumerate(cells)]

    def _side(self, column: int) -> Literal["left", "right"]:
        return "left" if column < self.num_left else "right"


def figure(value: float | None, form: str, unit: str = "") -> str:
    """A figure as text for a table; empty if it is None."""
    return "" if value is None else f"{value:{form}}{unit}"


def _text(value: object) -> str:
    return "" if value is None else str(value)
