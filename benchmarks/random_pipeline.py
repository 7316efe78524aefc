"""Writes a HunyuanVideo pipeline of full size with random weights.

    python -m benchmarks.random_pipeline FOLDER
    xattn-video generate --model FOLDER --prompt "a cat walks on the grass" --report run.json

Use it if no model hub is reachable. Loading, offloading, time and memory are the same as with
HunyuanVideo's own weights, but the video is noise. The tokenizers are the demo model's. It needs
39 GiB of disk, and the same amount of memory, on a CUDA device if there is one.
"""

import argparse
import contextlib
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKLHunyuanVideo,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideoPipeline,
    HunyuanVideoTransformer3DModel,
)
from transformers import AutoTokenizer, CLIPTextConfig, CLIPTextModel, LlamaConfig, LlamaModel

from xattn_video.files import check_output_folder, user_path
from xattn_video.pipelines.demo import DEMO_DIR
from xattn_video.reporting.endings import run_script


@dataclass(frozen=True, slots=True)
class PipelineSizes:
    """Arguments of the models' configurations; the defaults are HunyuanVideo's."""

    transformer: dict[str, Any] = field(default_factory=dict)
    vae: dict[str, Any] = field(default_factory=dict)
    text_encoder: dict[str, Any] = field(
        default_factory=lambda: {
            "vocab_size": 128320,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "max_position_embeddings": 8192,
        }
    )
    text_encoder_2: dict[str, Any] = field(
        default_factory=lambda: {
            "vocab_size": 49408,
            "hidden_size": 768,
            "intermediate_size": 3072,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
        }
    )


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=user_path)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(words)
    check_output_folder(arguments.folder, what="folder")
    torch.manual_seed(arguments.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    pipe = random_pipeline(PipelineSizes(), device)
    check_room(pipe, arguments.folder)
    pipe.save_pretrained(arguments.folder)
    print(f"{arguments.folder}: weights drawn on {device}, seed {arguments.seed}")


def random_pipeline(sizes: PipelineSizes, device: torch.device) -> HunyuanVideoPipeline:
    """A pipeline with a bfloat16 transformer, and float16 VAE and text encoders."""
    tokenizer = AutoTokenizer.from_pretrained(DEMO_DIR / "tokenizer")
    tokenizer_2 = AutoTokenizer.from_pretrained(DEMO_DIR / "tokenizer_2")
    with new_weights(device, torch.bfloat16):
        transformer = HunyuanVideoTransformer3DModel(**sizes.transformer)
    with new_weights(device, torch.float16):
        vae = AutoencoderKLHunyuanVideo(**sizes.vae)
        llama = LlamaConfig(**sizes.text_encoder, pad_token_id=tokenizer.pad_token_id)
        text_encoder = LlamaModel(llama)
        # The pooled state is that of the end token.
        clip = CLIPTextConfig(**sizes.text_encoder_2, eos_token_id=tokenizer_2.eos_token_id)
        text_encoder_2 = CLIPTextModel(clip)
    return HunyuanVideoPipeline(
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        transformer=transformer,
        vae=vae,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
        text_encoder_2=text_encoder_2,
        tokenizer_2=tokenizer_2,
    )


def check_room(pipe: HunyuanVideoPipeline, folder: Path) -> None:
    """Check that a pipeline's weights fit on a folder's disk.

    Raises:
        ValueError: They do not fit.
    """
    models = [part for part in pipe.components.values() if isinstance(part, torch.nn.Module)]
    weights = [tensor for model in models for tensor in model.state_dict().values()]
    size, free = sum(tensor.nbytes for tensor in weights), shutil.disk_usage(folder).free
    if free < size:
        raise ValueError(
            f"{str(folder)!r} has {free / 2**30:.2f} GiB free and the pipeline takes "
            f"{size / 2**30:.2f} GiB; free space there, or use another folder."
        )


@contextlib.contextmanager
def new_weights(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """A context in which new models draw their weights on ``device`` in ``dtype``."""
    previous = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            yield
    finally:
        torch.set_default_dtype(previous)


if __name__ == "__main__":
    run_script(main)
