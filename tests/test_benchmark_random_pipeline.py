"""The pipeline with random weights; that a tiny one runs is seen in the command line's tests."""

import pytest
import torch
from full_disk import small_disk
from hunyuan import TINY_PIPELINE

from benchmarks import random_pipeline
from xattn_video.pipelines.model_shape import ModelShape


def parameters(model) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def test_it_is_of_hunyuan_videos_size():
    sizes, shape = random_pipeline.PipelineSizes(), ModelShape()
    pipe = random_pipeline.random_pipeline(sizes, torch.device("meta"))
    text = parameters(pipe.text_encoder) + parameters(pipe.text_encoder_2)
    assert text == shape.text_parameters
    assert parameters(pipe.vae) == shape.vae_parameters
    # The plan leaves out the small embedders.
    assert parameters(pipe.transformer) == pytest.approx(shape.transformer_parameters, rel=0.01)
    assert pipe.transformer.dtype == torch.bfloat16
    assert pipe.vae.dtype == pipe.text_encoder.dtype == torch.float16


def test_the_command_writes_a_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(random_pipeline, "PipelineSizes", lambda: TINY_PIPELINE)
    folder = tmp_path / "tiny"
    random_pipeline.main([str(folder), "--seed", "3"])
    assert (folder / "model_index.json").is_file()
    assert list((folder / "transformer").glob("*.safetensors"))
    assert "seed 3" in capsys.readouterr().out


def test_a_disk_that_is_too_small_is_found_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(random_pipeline, "PipelineSizes", lambda: TINY_PIPELINE)
    with small_disk("full disk", tmp_path / "disk") as disk:
        with pytest.raises(ValueError, match="free space there, or use another folder"):
            random_pipeline.main([str(disk / "tiny")])
        assert list((disk / "tiny").iterdir()) == []


def test_the_default_dtype_comes_back_after_a_failure():
    before = torch.get_default_dtype()

    def fail():
        with random_pipeline.new_weights(torch.device("cpu"), torch.float16):
            assert torch.empty(1).dtype == torch.float16
            raise RuntimeError("no such size")

    with pytest.raises(RuntimeError, match="no such size"):
        fail()
    assert torch.get_default_dtype() == before
