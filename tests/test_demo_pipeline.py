"""The demo model as a pipeline of Diffusers, from the files of the package."""

import json
from pathlib import Path

import diffusers
import pytest
import torch

from xattn_video.pipelines import demo
from xattn_video.pipelines.demo import DEMO_DIR, load_demo_pipeline

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.skipif(
    not (DEMO_DIR / "model_index.json").is_file(), reason="needs the demo model's files"
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_it_is_hunyuan_videos_pipeline_in_the_dtype_asked_for(dtype):
    pipe = load_demo_pipeline(dtype, "cpu")
    assert type(pipe) is diffusers.HunyuanVideoPipeline
    assert type(pipe.transformer) is diffusers.HunyuanVideoTransformer3DModel
    assert type(pipe.vae) is diffusers.AutoencoderKLHunyuanVideo
    parts = (pipe.transformer, pipe.vae, pipe.text_encoder, pipe.text_encoder_2)
    assert {part.dtype for part in parts} == {dtype}
    assert {part.device for part in parts} == {torch.device("cpu")}


def test_its_training_keeps_to_half_an_hour_and_28_decibels():
    calls = json.loads((DEMO_DIR / "TRAINING.json").read_text())["calls"]
    seconds = {call["stage"]: call["training_seconds"] for call in calls if call["gpu"]}
    assert set(seconds) == {"vae", "decoder", "transformer"}
    assert sum(seconds.values()) <= 1800
    psnr = {call["stage"]: call.get("reconstruction_psnr_db") for call in calls}["decoder"]
    assert psnr["256x256"]["mean"] >= 28
    page = " ".join((ROOT / "docs/demo_model.md").read_text().split())
    figures = [*seconds.values(), sum(seconds.values())]
    for said in [f"{figure:,.0f} s" for figure in figures] + [
        f"{size['mean']:.2f}" for size in psnr.values()
    ]:
        assert said in page


def test_missing_files_say_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setattr(demo, "DEMO_DIR", tmp_path)
    with pytest.raises(FileNotFoundError, match="reinstall xattn-video, or train the model"):
        load_demo_pipeline(torch.float32, "cpu")
