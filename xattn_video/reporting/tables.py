"""Tables of text on a terminal."""

from collections.abc import Sequence

from rich.table import Table

from xattn_video.reporting.console import output_console

_GAP = 2


def print_table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table on stdout, the first column to the left, figures to the right.

    Where the terminal is too narrow the headings break between words, and never a cell.
    """
    table = Table(box=None, pad_edge=False, padding=(0, _GAP, 0, 0))
    needed = 0
    for number, heading in enumerate(headings):
        width = max(map(len, (*heading.split(), *(row[number] for row in rows))))
        table.add_column(heading, justify="right" if number else "left", min_width=width)
        needed += width + _GAP
    for row in rows:
        table.add_row(*row)
    console = output_console()
    console.width = max(console.width, needed)
    console.print(table, crop=False)
