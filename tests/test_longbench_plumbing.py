"""LongBench from end to end: the real harness, made data, and the language demo model.

The scores mean nothing: the demo model has not learned to answer such questions.
"""

import json
from pathlib import Path

import pytest
from harness_scripts import run_script

for package in ("lm_eval", "jieba", "fuzzywuzzy", "rouge"):
    pytest.importorskip(package, reason="of the harness; pip install 'lm_eval[longbench]'")


def make_data(folder: Path, *tasks: str) -> None:
    """Write questions where `datasets` finds them before it asks the hub."""
    grass = "The grass is green. The sky is blue. The sun is yellow."
    parts = ""
    for task in tasks:
        question = {
            "_id": "0",
            "question": "Which paragraph?",
            "context": "\n".join([*[grass] * 99, "Paragraph 3: it is sunny."]),
            "answers": ["Paragraph 3"],
            "length": 1000,
            "dataset": task,
            "language": "en",
            "all_classes": [],
        }
        (folder / task).mkdir(parents=True)
        (folder / task / "test.jsonl").write_text(f"{json.dumps(question)}\n" * 2)
        file = f"{{split: test, path: {task}/test.jsonl}}"
        parts += f"- config_name: {task}\n  data_files: [{file}]\n"
    (folder / "README.md").write_text(f"---\nconfigs:\n{parts}---\n")


@pytest.mark.slow
def test_the_script_runs_to_its_table(tmp_path):
    make_data(tmp_path / "Xnhyacinth/LongBench", "qasper", "passage_retrieval_en")
    words = ["--model=demo", "--samples=2", "--settings=0.9:8:2", "--min-tokens=0"]
    words += ["--tasks=longbench_qasper,longbench_passage_retrieval_en"]
    messages, report = run_script("run_longbench.sh", tmp_path, *words)
    assert "  longbench_qasper, dense: 2 of 2 samples" in messages
    densities = [one["density"] or 0 for one in report["results"]]
    assert [0 < density < 1 for density in densities] == [False, True] * 2
    assert "longbench_passage_retrieval_en" in (tmp_path / "run/report.md").read_text()
