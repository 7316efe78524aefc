"""The training script of the small language model, at a tiny size."""

import copy
import json
import random
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from transformers import AttentionInterface, AutoTokenizer, LlamaForCausalLM

sys.path.append(str(Path(__file__).parents[1] / "scripts"))
from language_training import forms, training, training_record, training_step
from language_training.sequences import END, Batch, Encoder, Sequences, train_tokenizer
from language_training.training_step import FoldedAttention, TrainingStep

ROOT = Path(__file__).parents[1]


def test_folded_sequences_are_those_of_a_batch():
    model = training.make_model(training.SMOKE)
    ids = torch.randint(3, 2048, (4, 64))
    model.set_attn_implementation("sdpa")
    expected = model.model(ids, use_cache=False).last_hidden_state
    folded = FoldedAttention(torch.device("cpu"))
    folded.length = 64
    AttentionInterface.register("folded", folded)
    model.set_attn_implementation("folded")
    positions = torch.arange(64).repeat(4)[None]
    found = model.model(ids.view(1, -1), position_ids=positions, use_cache=False)
    torch.testing.assert_close(found.last_hidden_state.view(4, 64, -1), expected)


def test_a_batch_holds_sequences_of_one_length(tmp_path):
    train_tokenizer(tmp_path, 20)
    # 64 tokens hold no form; such sequences are repeated strings alone.
    batches = iter(Sequences(tmp_path, 1024, 256, 0.3, [64]))
    some = [next(batches) for _ in range(60)]
    assert {batch.length for batch in some} == {64, 256}
    for batch in some:
        assert batch.ids.shape == (1, 1024)
        torch.testing.assert_close(batch.shares.sum(1), torch.ones(2))
        # The last token of a sequence predicts none.
        assert not batch.shares.view(2, -1, batch.length)[:, :, -1].any()


def test_an_answer_counts_where_it_is_predicted(tmp_path):
    train_tokenizer(tmp_path, 20)
    batch = next(iter(Sequences(tmp_path, 512, 512, 0.0, [])))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    predicted = batch.ids[0].roll(-1)[batch.shares[0] > 0]
    text, answers = tokenizer.decode(batch.ids[0]), tokenizer.decode(predicted).split("</s>")
    assert answers[-1] == ""
    assert len(answers) > 1
    assert all(answer in text for answer in answers)


def test_the_values_of_a_key_come_in_any_order(tmp_path):
    train_tokenizer(tmp_path, 20)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    pieces = [
        forms.Piece("The special magic numbers for TV-set are"),
        forms.Piece(forms._answer(["TV-set"], ["1234567", "2345678", "3456789"]), True, True),
        forms.Piece(forms._answer(["cup"], ["5634567", "7845678", "7834567"]), True, True),
        forms.Piece(forms._answer(["one", "TV-set"], ["4567890", "5678901"]), True),
    ]
    text = Encoder(tmp_path).encode(pieces)
    found = {
        tokenizer.decode(text.ids[place]): sorted(tokenizer.decode(one) for one in others)
        for place, others in text.others.items()
    }
    # No token counts twice.
    assert found == {"12": ["23", "34"], "23": ["34"], "34": [], "56": ["78"], "78": []}
    assert all(text.answers[place] for place in text.others)
    assert text.ids[-1] == END


def test_another_right_token_is_as_right():
    torch.manual_seed(0)
    model = training.make_model(training.SMOKE)
    ids, others = torch.randint(3, 2048, (1, 128)), torch.zeros(3, 128, dtype=torch.long)
    logits = model(ids).logits[0]
    shares = torch.zeros(2, 128)
    shares[0, 60], shares[1, 70] = 1, 1
    others[1, 60] = logits[60].argmax()
    loss, right, _ = TrainingStep(model, 128, torch.device("cpu"))(
        Batch(128, ids, shares, others), 0.01
    )
    either = logits[60].softmax(-1)[torch.stack((ids[0, 61], others[1, 60]))].sum()
    torch.testing.assert_close(loss, -either.log())
    assert right == 1


def test_a_step_is_that_of_plain_optimizers():
    torch.manual_seed(0)
    found = training.make_model(training.SMOKE)
    expected, before = copy.deepcopy(found), copy.deepcopy(found)
    ids = torch.randint(3, 2048, (1, 128))
    shares = torch.zeros(2, 128)
    shares[0, 60:63], shares[1, 70:120] = 1 / 3, 1 / 50
    batch = Batch(64, ids, shares, torch.zeros(3, 128, dtype=torch.long))
    loss, right, _ = TrainingStep(found, 128, torch.device("cpu"))(batch, 0.01)

    logits = expected(ids.view(2, 64)).logits.flatten(0, 1)
    losses = torch.nn.functional.cross_entropy(logits, ids[0].roll(-1), reduction="none")
    torch.testing.assert_close(loss, losses[60:63].mean())
    assert right == (logits.argmax(-1) == ids[0].roll(-1))[60:63].float().mean()
    (losses[60:63].mean() + 0.3 * losses[70:120].mean()).backward()
    torch.nn.utils.clip_grad_norm_(expected.parameters(), 1.0)
    matrices = [one for one in expected.model.layers.parameters() if one.dim() > 1]
    vectors = [one for one in expected.parameters() if one.dim() == 1]
    options = {"lr": 0.01, "weight_decay": 0.1}
    torch.optim.Muon(matrices, adjust_lr_fn="match_rms_adamw", **options).step()
    betas = (0.9, 0.98)
    torch.optim.AdamW([expected.model.embed_tokens.weight], betas=betas, **options).step()
    torch.optim.AdamW(vectors, lr=0.01, betas=betas, weight_decay=0.0).step()
    models = (found.parameters(), expected.parameters(), before.parameters())
    for one, other, old in zip(*models, strict=True):
        # Muon makes its updates in bfloat16.
        assert (one - other).norm() < 0.05 * (other - old).norm()


def test_the_entropy_is_that_of_causal_attention(monkeypatch):
    query, key = torch.randn(2, 3, 4, 32, 16)
    rows = torch.tensor([0, 5, 31])
    monkeypatch.setattr(training_step.torch, "randint", lambda *_, **__: rows)
    scores = (query @ key.mT / 4).masked_fill(torch.ones(32, 32).triu(1).bool(), -torch.inf)
    expected = torch.distributions.Categorical(logits=scores[:, :, rows]).entropy().mean()
    torch.testing.assert_close(training_step._entropy(query, key), expected)


def test_a_share_of_the_entropy_makes_attention_narrow():
    torch.manual_seed(0)
    ids, shares = torch.randint(3, 2048, (1, 128)), torch.full((2, 128), 1 / 128)
    batch = Batch(64, ids, shares, torch.zeros(3, 128, dtype=torch.long))
    last = {}
    for share in (0.0, 3.0):
        step = TrainingStep(training.make_model(training.SMOKE), 128, torch.device("cpu"))
        for _ in range(30):
            *_, entropy = step(batch, 0.02, share)
        last[share] = entropy.item()
    assert last[3.0] < 0.5 * last[0.0]


def test_a_text_names_a_key_once(monkeypatch):
    monkeypatch.setattr(forms, "_word", lambda: random.choice("abcdefgh"))
    for _ in range(20):
        for form in (lambda: forms.many_keys(250), lambda: forms.several_values(900)):
            keys = re.findall(r"numbers for (\w) is", "".join(piece.text for piece in form()))
            assert len(set(Counter(keys).values())) == 1


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
