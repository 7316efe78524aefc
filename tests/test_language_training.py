"""The training script of the small language model, at a tiny size."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AttentionInterface, LlamaForCausalLM

pytest.importorskip("wonderwords", reason="of the harness; pip install 'lm_eval[ruler]'")
sys.path.append(str(Path(__file__).parents[1] / "scripts"))
from language_training import training, training_record
from language_training.sequences import Sequences, train_tokenizer

ROOT = Path(__file__).parents[1]


def test_folded_sequences_are_those_of_a_batch():
    model = training.make_model(training.SMOKE)
    ids = torch.randint(3, 2048, (4, 64))
    model.set_attn_implementation("sdpa")
    expected = model.model(ids, use_cache=False).last_hidden_state
    folded = training.FoldedAttention(torch.device("cpu"))
    folded.length = 64
    AttentionInterface.register("folded", folded)
    model.set_attn_implementation("folded")
    positions = torch.arange(64).repeat(4)[None]
    found = model.model(ids.view(1, -1), position_ids=positions, use_cache=False)
    torch.testing.assert_close(found.last_hidden_state.view(4, 64, -1), expected)


def test_every_batch_has_as_many_tokens(tmp_path):
    train_tokenizer(tmp_path, 20)
    # 64 tokens hold no form; such sequences are repeated strings alone.
    batches = iter(Sequences(tmp_path, 1024, 256, 0.3, [64]))
    found = {next(batches)[0].shape for _ in range(60)}
    assert found == {(4, 256), (16, 64)}


@pytest.mark.slow
def test_the_script_writes_a_model_and_its_evaluation(tmp_path):
    script = ROOT / "scripts/train_language_model.py"
    words = ["--folder", tmp_path, "--minutes", "0.3", "--smoke", "--no-compile"]
    words += ["--samples", "1", "--lengths", "256"]
    done = subprocess.run(
        [sys.executable, script, *words], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    model = LlamaForCausalLM.from_pretrained(tmp_path)
    assert model.dtype == torch.bfloat16
    evaluation = json.loads((tmp_path / "evaluation.json").read_text())
    assert evaluation["samples"] == 1
    assert set(evaluation["shares"]) == {"dense", "0.9"}
    assert set(evaluation["shares"]["dense"]["256"]["many_keys"]) == {"right", "density"}
    record = json.loads((tmp_path / "TRAINING.json").read_text())
    assert record["weights_sha256"] == evaluation["weights_sha256"]
    (call,) = record["calls"]
    assert call["steps"] > 0
    assert call["training_seconds"] >= 18


def test_a_record_keeps_the_calls_of_the_model_before(tmp_path):
    for name in ("first", "second"):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "model.safetensors").write_text(name)
    training_record.write_training(tmp_path / "first", None, {"steps": 1})
    training_record.write_training(tmp_path / "second", tmp_path / "first", {"steps": 2})
    first, second = (
        json.loads((tmp_path / name / "TRAINING.json").read_text()) for name in ("first", "second")
    )
    assert [call["steps"] for call in second["calls"]] == [1, 2]
    assert first["weights_sha256"] != second["weights_sha256"]
