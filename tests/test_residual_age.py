"""The error of steps by the age of what the last refresh kept."""

import json

from benchmarks.residual_age import draw_ages, errors_by_age


def row(step, error, sparse=True, refreshed=False):
    return {"step": step, "error": error, "sparse": sparse, "refreshed": refreshed}


ROWS = [
    row(4, 0.0, sparse=False, refreshed=True),
    row(5, 0.1),
    row(6, 0.3),
    row(7, 0.0, refreshed=True),
    row(8, 0.2),
    row(9, 0.0, sparse=False),
]


def test_an_age_counts_from_the_last_refresh():
    assert errors_by_age(ROWS) == {1: (0.1 + 0.2) / 2, 2: 0.3}


def test_dense_and_refresh_steps_are_not_drawn(tmp_path):
    names = ("plain", "compensated", "with refreshes")
    rows = [{"setting": name, **one} for name in names for one in ROWS]
    path = tmp_path / "results.json"
    path.write_text(json.dumps({"settings": dict.fromkeys(names, ""), "rows": rows}))
    by_step, by_age = draw_ages(path).axes
    assert [list(line.get_xdata()) for line in by_step.lines] == [[5, 6, 8]] * 3
    assert [list(line.get_xdata()) for line in by_age.lines] == [[1, 2]]
