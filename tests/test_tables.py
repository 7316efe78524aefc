"""One table with three faces, and pages of which a part is generated."""

import io

import pytest
from rich.console import Console

from xattn_video.reporting.pages import render, replace_between
from xattn_video.reporting.tables import Table

TABLE = Table(("what it is", "ms"), (("a|b <x>", "1.5"), ("c", "")))


def printed(table: Table, width: int) -> list[str]:
    console = Console(file=io.StringIO(), width=width, highlight=False, markup=False)
    console.print(table.terminal(console.width), crop=False)
    return [line.rstrip() for line in console.file.getvalue().splitlines()]


def test_markdown_escapes_what_would_end_a_cell():
    assert TABLE.markdown() == (
        "| what it is | ms |\n| --- | ---: |\n| a\\|b <x> | 1.5 |\n| c |  |"
    )


def test_html_escapes_its_text():
    html = TABLE.html()
    assert '<th style="text-align: left">what it is</th>' in html
    assert '<td style="text-align: left">a|b &lt;x&gt;</td>' in html
    assert '<td style="text-align: right">1.5</td>' in html
    assert html.count("<tr>") == 3


def test_a_terminal_has_figures_to_the_right():
    assert printed(TABLE, 80) == ["what it is   ms", "a|b <x>     1.5", "c"]


def test_a_narrow_terminal_gets_the_columns_below_each_other_and_nothing_is_broken():
    table = Table(
        ("setting", "speed-up", "step speed-up", "GiB"), (("tau 0.9", "1.20x", "1.50x", "10.2"),)
    )
    assert printed(table, 80) == [
        "setting  speed-up  step speed-up   GiB",
        "tau 0.9     1.20x          1.50x  10.2",
    ]
    assert printed(table, 30) == [
        "setting  speed-up",
        "tau 0.9     1.20x",
        "",
        "setting  step speed-up   GiB",
        "tau 0.9          1.50x  10.2",
    ]
    assert printed(TABLE, 5) == ["what it is   ms", "a|b <x>     1.5", "c"]


def test_rows_are_made_by_the_columns():
    columns = {"n": str, "half": lambda n: n / 2, "none": lambda n: None}
    assert Table.of([2, 4], columns).rows == (("2", "1.0", ""), ("4", "2.0", ""))
    assert Table.of([2], columns, keep_empty=False).columns == ("n", "half")
    assert Table.of([], columns).markdown().count("\n") == 1


def test_a_row_of_another_length_is_refused():
    with pytest.raises(ValueError, match="for each of its 2 columns, got 1"):
        Table(("a", "b"), (("1",),))


def test_a_page_is_replaced_between_its_marks_alone():
    assert replace_between("a<1>old<2>b", "<1>", "<2>", "new") == "a<1>new<2>b"
    for text in ("no marks", "<1> alone", "<2> before <1>", "<1><1><2>"):
        with pytest.raises(ValueError, match="must hold these two lines once"):
            replace_between(text, "<1>", "<2>", "new")


def test_a_template_that_names_what_is_not_given_fails(tmp_path):
    from jinja2 import UndefinedError

    template = tmp_path / "page.jinja"
    template.write_text("{{ a }} & {{ b }}\n")
    assert render(template, a="<1>", b=2) == "<1> & 2\n"
    with pytest.raises(UndefinedError, match="'b' is undefined"):
        render(template, a=1)
