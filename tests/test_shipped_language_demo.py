"""The weights of the language demo model: present, small, those of their records, and trained."""

import hashlib
import json

import pytest
from command_line import run_cli

from xattn_video.language.model_sources import DEMO_FOLDER

WEIGHTS = DEMO_FOLDER / "model.safetensors"


def test_they_are_small():
    files = [path for path in DEMO_FOLDER.iterdir() if path.is_file()]
    assert 15e6 < WEIGHTS.stat().st_size < 20e6
    assert sum(path.stat().st_size for path in files) < 21e6


@pytest.mark.parametrize("record", ["TRAINING.json", "evaluation.json"])
def test_they_are_those_that_the_record_is_of(record):
    digest = hashlib.sha256(WEIGHTS.read_bytes()).hexdigest()
    assert json.loads((DEMO_FOLDER / record).read_text())["weights_sha256"] == digest


@pytest.mark.parametrize("tokens", [1024, 2048])
def test_dense_attention_finds_a_needle_and_sparse_attention_runs(tokens, tmp_path):
    report = tmp_path / "run.json"
    words = ["--model=demo", f"--tokens={tokens}", "--min-tokens=0", "--compare=sdpa"]
    code, _, err = run_cli("prefill", *words, "--device=cpu", f"--report={report}")
    assert code == 0, err
    runs = json.loads(report.read_text())["runs"]
    assert runs["sdpa"]["found"]
    assert len(runs["sparse"]["report"]["layers"]) == 6
    assert 0 < runs["sparse"]["report"]["density"] < 0.8


def test_it_answers_nearly_every_key_at_every_length():
    shares = json.loads((DEMO_FOLDER / "evaluation.json").read_text())["shares"]
    assert set(shares["dense"]) >= {"1024", "8192"}
    for forms in shares["dense"].values():
        assert forms["many_keys"]["right"] >= 0.9
