import json
import subprocess
import sys

import pytest

from xattn_video import SparsityReport
from xattn_video.policy.report import ForwardRun, LayerRun

DENSE = LayerRun("dense", "warm-up")
SKIPPED = LayerRun("skipped")


def forward(step, *layers, forward_pass=0, backend=None):
    return ForwardRun(step, forward_pass, 1000.0 - step, 0.9, backend, layers)


def sparse(kept, valid=100):
    return LayerRun("sparse", None, kept, valid)


def example(num_refused=0):
    """Two layers: warm-up, then two sparse steps of two passes, one layer skipped once."""
    return SparsityReport(
        ("transformer_blocks.0", "single_transformer_blocks.0"),
        (
            forward(0, DENSE, DENSE),
            forward(1, sparse(40), sparse(20), backend="triton"),
            forward(1, sparse(60), sparse(20), forward_pass=1, backend="triton"),
            forward(2, sparse(50), SKIPPED, backend="triton"),
        ),
        num_refused,
    )


def test_the_totals_are_those_of_what_ran_sparse():
    report = example()
    assert report.steps == (0, 1, 2)
    assert report.sparse_steps == (1, 2)
    assert report.sparse_layers == (0, 1)
    assert report.density == pytest.approx(190 / 500)
    assert report.backends == ("triton",)
    assert report.dense_reasons == {"warm-up": 2}


def test_the_summary_is_one_line():
    assert example(num_refused=1).summary() == (
        "2/3 steps x 2/2 layers sparse, density 0.38, 1 refused"
    )


def test_the_summary_says_why_all_ran_dense():
    report = SparsityReport(("a",), (forward(0, LayerRun("dense", "too few tokens")),))
    assert report.summary() == (
        "0/1 steps x 0/1 layers sparse, dense throughout (too few tokens), 0 refused"
    )
    assert SparsityReport(("a",), ()).summary() == (
        "0/0 steps x 0/1 layers sparse, nothing has run, 0 refused"
    )


def test_the_budget_counts_a_refresh_as_dense():
    refreshed = LayerRun("sparse", None, 30, 100, refreshed=True)
    report = SparsityReport(
        ("a", "b"),
        (
            forward(0, DENSE, DENSE),
            forward(1, refreshed, refreshed),
            forward(2, sparse(20), sparse(40)),
            forward(3, sparse(10), refreshed),
        ),
    )
    assert report.refresh_steps == (1, 3)
    assert report.density == pytest.approx((30 + 30 + 20 + 40 + 10 + 30) / 600)
    assert report.budget == pytest.approx((100 + 100 + 20 + 40 + 10 + 100) / 600)
    assert report.summary() == (
        "1/4 steps x 2/2 layers sparse and 2 refreshed, density 0.27 (budget 0.62), 0 refused"
    )
    assert report.to_dict()["refresh_steps"] == [1, 3]
    assert report.to_dict()["forwards"][3]["refreshed"] == [False, True]
    assert example().budget == example().density
    assert SparsityReport(("a",), ()).budget is None


def test_the_file_holds_every_layer_of_every_pass(tmp_path):
    example().save(tmp_path / "run.json")
    data = json.loads((tmp_path / "run.json").read_text())
    assert data["summary"] == example().summary()
    assert (data["num_steps"], data["num_sparse_steps"], data["num_layers"]) == (3, 2, 2)
    assert data["forwards"][2] == {
        "step": 1,
        "forward_pass": 1,
        "timestep": 999.0,
        "threshold": 0.9,
        "backend": "triton",
        "states": ["sparse", "sparse"],
        "reasons": [None, None],
        "densities": [0.6, 0.2],
        "refreshed": [False, False],
        "imbalance": None,
    }
    assert data["forwards"][3]["states"] == ["sparse", "skipped"]
    assert data["forwards"][0]["reasons"] == ["warm-up", "warm-up"]


def test_the_passes_of_a_step_share_a_cell_of_the_plot():
    assert example()._grid() == [["dense", 0.5, 0.5], ["dense", 0.2, "skipped"]]


def test_a_dense_pass_hides_no_sparse_one_of_its_step():
    runs = (forward(0, sparse(40)), forward(0, DENSE, forward_pass=1))
    for order in (runs, runs[::-1]):
        assert SparsityReport(("a",), order)._grid() == [[0.4]]


def test_the_plot_is_a_picture(tmp_path):
    example().plot(tmp_path / "run.png")
    assert (tmp_path / "run.png").read_bytes().startswith(b"\x89PNG")


def test_a_long_title_of_a_plot_is_not_cut_off(monkeypatch):
    figures = []
    monkeypatch.setattr(
        "xattn_video.policy.report.write_figure", lambda _, made: figures.append(made)
    )
    refreshed = LayerRun("sparse", None, 15, 100, refreshed=True)
    runs = [forward(step, refreshed if step == 14 else sparse(15)) for step in range(25)]
    SparsityReport(("a",), tuple(runs)).plot("run.png")
    (figure,) = figures
    figure.draw_without_rendering()
    title = figure.axes[0].title
    assert "budget" in title.get_text()
    inside = title.get_window_extent()
    assert 0 <= inside.x0 < inside.x1 <= figure.bbox.x1
    assert inside.y1 <= figure.bbox.y1


def test_plotting_leaves_matplotlib_as_it_was(tmp_path):
    """No figure of pyplot's, and no import of it: it may open a window."""
    code = f"""
import sys
sys.path[:0] = {sys.path!r}
from test_report import example
example().plot({str(tmp_path / "run.svg")!r})
assert "matplotlib.pyplot" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)


def test_an_empty_report_has_nothing_to_plot(tmp_path):
    with pytest.raises(ValueError, match="the report is empty; run the pipeline"):
        SparsityReport(("a",), ()).plot(tmp_path / "run.png")
