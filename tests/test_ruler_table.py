"""The table of RULER, the README's lines and the language demo model's tables, from made files."""

import json
from pathlib import Path

import pytest

from benchmarks import language_demo_tables, readme_lines, ruler_table

LABELS = ("dense", "tau 0.9, stride 8")
DENSE_LAYERS = "tau 0.9, stride 8, 2 dense layers"


def report(length, labels=LABELS, **changes):
    """Ten samples: dense attention solves the first task and half of the second."""
    results = []
    for task, wrong in (("niah_multikey_2", 0), ("ruler_vt", 5)):
        for label in labels:
            sparse = label != "dense"
            right = 10 - wrong - sparse
            results.append(
                {
                    "task": f"{task}, {length}",
                    "setting": label,
                    "scores": {str(n): float(n < right) for n in range(10)},
                    "seconds": 1.5,
                    "density": 2000 / length if sparse else None,
                    "attention": f"{6 - 2 * (label == DENSE_LAYERS)}/6 layers sparse over 1 token"
                    if sparse
                    else None,
                    "device": "a card",
                    "versions": {"torch": "2.11.0"},
                }
            )
    about = {"benchmark": "RULER", "model": "demo", "dtype": "bfloat16", "samples": 10}
    return {**about, "results": results, **changes}


@pytest.fixture
def committed(tmp_path, monkeypatch):
    """Write reports where the page looks for them."""

    def write(*reports):
        for number, one in enumerate(reports):
            (tmp_path / f"{number}.json").write_text(json.dumps(one))

    monkeypatch.setattr(ruler_table, "RULER", tmp_path)
    return write


def rows(text):
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_dense_and_sparse_and_the_papers_figures_stand_in_one_table(committed):
    committed(report(16384), report(8192))
    text = ruler_table.render()
    headings, _, *found = rows(text)
    assert headings[2:] == [
        "8,192: score, difference to dense",
        "density of sparse layers, of all",
        "16,384: score, difference to dense",
        "density of sparse layers, of all",
    ]
    dense, sparse, *papers = found[:5]
    assert dense == ["all solved", "dense", "1.000", "", "1.000", ""]
    assert sparse[1:4:2] == ["tau 0.9, stride 8", "0.244, 0.244"]
    assert sparse[2].startswith("0.900, -0.100 [-0.3000, +0.0000]")
    assert [row[:2] for row in papers] == [
        ["the paper's, of another model", name]
        for name in ("full attention", "XAttention, stride 8", "XAttention, stride 16")
    ]
    assert papers[0][2:] == ["0.940", "", "0.920", ""]
    assert papers[1][2:] == ["0.941, +0.000", "0.438", "0.932, +0.012", "0.275"]
    assert [row[0] for row in found[5:]] == ["niah_multikey_2"] * 2 + ["ruler_vt"] * 2
    assert "solved, which is 0.9 or more with dense attention at every length: niah_mu" in text
    assert "not solved: ruler_vt" in text
    assert "demo, bfloat16, 10 samples" in text
    command = "--model demo --lengths 8192,16384 --samples 10 --tasks niah_multikey_2,ruler_vt"
    assert f"{command} --settings 0.9:8`" in text
    assert "- a card: torch 2.11.0" in text


def test_a_length_that_the_paper_lacks_has_empty_cells(committed):
    committed(report(2048))
    papers = [row for row in rows(ruler_table.render()) if row[0].startswith("the paper's")]
    assert {*map(tuple, (row[2:] for row in papers))} == {("", "")}


def test_the_readme_tells_the_longest_length(committed):
    committed(report(8192), report(32768))
    speed, length, accuracy = readme_lines.long_context().splitlines()
    assert speed.startswith("- Speed: 131,072 tokens")
    assert "random weights" in speed
    assert length.startswith("- Length: 1,048,576 tokens")
    assert accuracy == (
        "- Accuracy: on the 1 of the 2 RULER tasks run here that the model `demo` solves, "
        "at 32,768 tokens, 1.000 with dense attention, 0.900 with tau 0.9, stride 8 (6.1% of the "
        "blocks)."
    )


def test_the_readme_says_that_all_tasks_are_solved(committed):
    one = report(8192)
    solved = [result for result in one["results"] if result["task"].startswith("niah")]
    committed({**one, "results": solved})
    accuracy = readme_lines.long_context().splitlines()[-1]
    assert accuracy.startswith(
        "- Accuracy: the model `demo` on all 1 RULER tasks run here, at 8,192 tokens, 1.000 with "
    )


def test_dense_layers_count_among_all_blocks(committed):
    """With two of six layers dense, 6.1% of the others' blocks are 37.4% of all."""
    committed(report(32768, (*LABELS, DENSE_LAYERS)))
    accuracy = readme_lines.long_context().splitlines()[-1]
    assert "tau 0.9, stride 8 (6.1% of the blocks), " in accuracy
    assert accuracy.endswith(f"{DENSE_LAYERS} (37.4% of the blocks, 6.1% in its sparse layers).")
    assert [row[3] for row in rows(ruler_table.render())[2:5]] == [
        "",
        "0.061, 0.061",
        "0.061, 0.374",
    ]


def test_without_a_report_nothing_is_claimed(committed):
    assert ruler_table.render() == "No run is committed yet.\n"
    assert "- Accuracy: not measured on a trained model yet.\n" in readme_lines.long_context()


@pytest.mark.parametrize(
    ("reports", "text"),
    [
        ([report(8192), report(8192)], "hold the same result"),
        ([report(8192), report(16384, model="other")], "must be of one model"),
        ([report(8192), report(16384, results=report(16384)["results"][:2])], "the same tasks"),
    ],
)
def test_reports_that_do_not_belong_together_are_refused(reports, text, committed):
    committed(*reports)
    with pytest.raises(ValueError, match=text):
        ruler_table.render()


def test_the_demo_models_page_shows_what_lies_beside_its_weights(tmp_path):
    assert language_demo_tables.training(tmp_path) == "No weights are committed yet.\n"
    assert language_demo_tables.evaluation(tmp_path) == "No evaluation is committed yet.\n"
    call = {"command": "a b", "device": "a card", "steps": 1234, "training_seconds": 90}
    versions = {"versions": {"torch": "2.11.0"}}
    (tmp_path / "TRAINING.json").write_text(json.dumps({"calls": [call, call], **versions}))
    _, _, first, second = rows(text := language_demo_tables.training(tmp_path))
    assert first == second == ["`a b`", "a card", "1,234", "1.5"]
    assert "- 3.0 minutes in all; torch 2.11.0" in text
    shares = {
        setting: {
            "256": {"many_keys": {"right": right, "density": density}},
            "8192": {
                form: {"right": right, "density": density} for form in language_demo_tables._RULER
            },
        }
        for setting, right, density in (("dense", 1.0, 1.0), ("0.9", 0.95, 0.3))
    }
    record = {"shares": shares, "samples": 20, "dtype": "bfloat16", "device": "a card"}
    (tmp_path / "evaluation.json").write_text(json.dumps(record | versions))
    headings, _, keys, uuids, *_ = rows(text := language_demo_tables.evaluation(tmp_path))
    assert headings == ["form", "in RULER", "256", "8,192"]
    assert keys == ["many_keys", "niah_multikey_2", "1.00 / 0.95, 0.30", "1.00 / 0.95, 0.30"]
    assert uuids[2:] == ["", "1.00 / 0.95, 0.30"]
    assert "20 prompts each, bfloat16, a card: torch 2.11.0" in text


def test_the_forms_of_the_table_are_those_that_it_learned(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "scripts")
    from language_training.forms import FORMS

    assert {form.__name__ for form in FORMS} <= {*language_demo_tables._RULER}
