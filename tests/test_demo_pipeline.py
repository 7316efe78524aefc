"""The demo model as a pipeline of Diffusers, from the files of the package."""

import diffusers
import pytest
import torch

from xattn_video.pipelines import demo
from xattn_video.pipelines.demo import DEMO_DIR, load_demo_pipeline

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


def test_missing_files_say_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setattr(demo, "DEMO_DIR", tmp_path)
    with pytest.raises(FileNotFoundError, match="reinstall xattn-video, or train the model"):
        load_demo_pipeline(torch.float32, "cpu")
