"""Queries, keys and values of a model as benchmark inputs."""

import argparse
import json

import pytest
import torch
from hunyuan import VIDEO_TOKENS, forward_inputs, tiny_pipeline

from benchmarks import attention, demo_inputs
from benchmarks.inputs_file import input_names, load_inputs, save_inputs
from xattn_video import XAttnProcessor
from xattn_video.measure.attention_problems import AttentionTensors
from xattn_video.measure.selection_quality import selection_quality
from xattn_video.ops.scoring import block_scores
from xattn_video.ops.selection import select_blocks

CPU = torch.device("cpu")


@pytest.fixture
def peaky():
    """Tensors whose blocks differ: every block of keys looks along a direction of its own."""
    directions = torch.randn(1, 2, 8, 16).repeat_interleave(128, dim=2)
    query, key = (directions + 0.3 * torch.randn(1, 2, 1024, 16) for _ in range(2))
    return AttentionTensors("peaky", query, key, torch.randn(1, 2, 1024, 16), 0, True)


def test_layers_are_captured_as_the_model_has_them():
    pipe = tiny_pipeline()
    processor = XAttnProcessor(threshold=1.0)
    pipe.transformer.set_attn_processor(processor)
    captured = demo_inputs.Capture(processor, ["transformer_blocks.1"], [0])
    processor.observers.append(captured)
    with torch.no_grad():
        pipe.transformer(**forward_inputs(lengths=(10,)))
    ((step, layer), (query, key, value)) = next(iter(captured.tensors.items()))
    assert (step, layer) == (0, "transformer_blocks.1")
    assert query.shape == key.shape == value.shape == (1, VIDEO_TOKENS + 10, 2, 16)
    assert captured.num_text_tokens == 10
    assert len(captured.tensors) == 1


def test_layers_that_are_not_there_are_refused():
    arguments = argparse.Namespace(layers=["blocks.9"], steps=[0])
    with pytest.raises(ValueError, match=r"no layer 'blocks.9'; expected some of transformer_blo"):
        demo_inputs.capture(tiny_pipeline(), arguments)


def test_a_file_gives_back_what_it_was_given(tmp_path):
    tensors = torch.randn(3, 1, 300, 2, 16)
    save_inputs(tmp_path / "x.safetensors", {"a-step6": tuple(tensors)}, 20)
    assert input_names(tmp_path / "x.safetensors") == ["a-step6"]
    found = load_inputs(tmp_path / "x.safetensors", "a-step6", CPU, torch.float32)
    assert found.num_text_tokens == 20
    assert found.from_model
    torch.testing.assert_close(found.key, tensors[1].transpose(1, 2), rtol=0, atol=0)


def test_rows_of_model_inputs_tell_the_kept_mass(tmp_path):
    save_inputs(tmp_path / "x.safetensors", {"a": tuple(torch.randn(3, 1, 1000, 2, 16))}, 20)
    output = tmp_path / "results.json"
    files = ["--inputs", str(tmp_path / "x.safetensors"), "--output", str(output)]
    options = ["--device", "cpu", "--threshold", "0.7", "--backends", "torch_gather"]
    attention.main([*files, *options, "--repeats", "1"])
    found = json.loads(output.read_text())
    assert found["failures"] == []
    assert {row["inputs"] for row in found["rows"]} == {"model"}
    (selection,) = [row for row in found["rows"] if row["name"] == "selection"]
    # Nearly uniform attention: mass and density go together.
    assert selection["kept_mass"] == pytest.approx(selection["sampled_density"], abs=0.1)
    assert selection["oracle_density"] <= selection["sampled_density"]


def test_kept_mass_is_the_true_one(peaky):
    mask = select_blocks(block_scores(peaky.query, peaky.key, stride=8), 0.9)
    found = selection_quality(peaky, mask, 8, 0.9)
    weights = (peaky.query @ peaky.key.mT * 16**-0.5).softmax(dim=-1)
    mass = weights.unflatten(3, (8, 128)).sum(-1).unflatten(2, (8, 128)).mean(3)
    kept = (mass * mask).sum(-1)
    assert found["kept_mass"] == pytest.approx(kept.mean().item(), rel=1e-5)
    assert found["least_kept_mass"] == pytest.approx(kept.min().item(), rel=1e-5)
    assert found["formula_density"] == pytest.approx(found["sampled_density"])
    oracle = select_blocks(mass, 0.9)
    assert found["oracle_density"] == pytest.approx(oracle.float().mean().item())


def test_a_missing_file_is_refused(capsys):
    with pytest.raises(SystemExit):
        attention.main(["--inputs", "nowhere.safetensors"])
    assert "--inputs nowhere.safetensors is not a file" in capsys.readouterr().err
