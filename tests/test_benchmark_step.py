"""The whole-step benchmark, on a tiny transformer."""

import json

import pytest
import torch
from hunyuan import TEXT_DIM, tiny_transformer

from benchmarks import step


@pytest.fixture
def tiny(monkeypatch):
    """A transformer that runs at once, in the benchmark's place for a large one."""
    transformer = tiny_transformer().to(torch.bfloat16)
    monkeypatch.setattr(step, "random_transformer", lambda device, layers: transformer)


def test_steps_of_each_kind_are_recorded(tiny, tmp_path, capsys):
    output = tmp_path / "step.json"
    options = "--height 256 --width 256 --num-frames 17 --device cpu --threshold 0.3"
    step.main([*options.split(), "--output", str(output)])
    rows = json.loads(output.read_text())["rows"]
    assert [row["phase"] for row in rows] == ["stock", "dense", "sparse"]
    assert [row["backend"] for row in rows] == ["stock", "dense", "torch_gather"]
    for row in rows:
        assert row["name"] == "step"
        assert row["n"] == 5 * 16 * 16 + 256
        assert row["latency_ms"] > 0
        assert row["peak_memory_gib"] is None
    assert 0.2 < rows[-1]["density"] < 0.6
    assert "sparse  torch_gather density" in capsys.readouterr().out


def test_the_inputs_fit_the_transformer():
    arguments = step.parse_arguments(["--num-frames", "17", "--height", "64", "--width", "64"])
    config = tiny_transformer().config
    inputs = step.step_inputs(arguments, config, torch.device("cpu"))
    assert inputs["encoder_hidden_states"].shape == (1, 256, TEXT_DIM)
    assert inputs["hidden_states"].shape == (1, 4, 5, 8, 8)
    assert inputs["encoder_attention_mask"].sum() == 60
