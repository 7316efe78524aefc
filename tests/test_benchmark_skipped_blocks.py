"""The benchmark of compensation and token order, and its tables."""

import json

import pytest

from benchmarks import skipped_blocks, skipped_table
from benchmarks.results_files import ResultFile
from xattn_video.measure.operator_checks import WrongResultError

SMALL = ["--grid=2,8,16", "--text-tokens=40", "--heads=2", "--head-dim=64", "--repeats=1"]
PARTS = {
    "scoring": 18.0,
    "norms": 0.5,
    "selection": 1.0,
    "attention": 81.0,
    "attention and log-sum-exp": 81.25,
    "compensation, means": 4.0,
    "compensation, first-order": 7.0,
    "double-stream preparation, raster": 3.0,
    "double-stream preparation, hilbert": 3.25,
    "single-stream preparation, raster": 2.0,
    "single-stream preparation, hilbert": 3.0,
    "output in the model's order": 0.25,
}


def test_every_part_is_timed(tmp_path):
    skipped_blocks.main([*SMALL, f"--output={tmp_path / 'found.json'}"])
    rows = json.loads((tmp_path / "found.json").read_text())["rows"]
    assert [row["part"] for row in rows] == list(PARTS)
    assert {row["n"] for row in rows} == {2 * 8 * 16 + 40}


def test_a_wrong_compensation_is_not_timed(monkeypatch, capsys):
    right, calls = skipped_blocks.compensate, []

    def wrong(inputs, out, lse, num_blocks, first_order):
        calls.append(first_order)
        out = right(inputs, out, lse, num_blocks, first_order)
        return out * 1.1 if len(calls) == 1 else out

    monkeypatch.setattr(skipped_blocks, "compensate", wrong)
    with pytest.raises(WrongResultError, match=r"differs from plain torch by 0\.1"):
        skipped_blocks.main(SMALL)
    assert not capsys.readouterr().out


def test_the_costs_are_added_up():
    sizes = {"n": 119_056, "heads": 24, "head_dim": 128, "density": 0.3, "extra_memory_gib": 0.5}
    rows = [{"part": part, "latency_ms": ms, **sizes} for part, ms in PARTS.items()]
    content = {"gpu": "A GPU", "versions": {"torch": "2"}, "command": "c", "rows": rows}
    page = skipped_table.render([ResultFile("a", content)])
    assert "| compensation, first-order | 7.00 | 0.50 |" in page
    assert "adds 7.0 ms to the 100.0 ms of scoring, selection and attention: 7.0%" in page
    # 20 layers of 0.25 + 0.25 and 40 of 1 + 0.25 ms.
    assert "0.5 ms to a double-stream layer and 1.2 ms to a single-stream one, 60 ms" in page
