"""A small, trained HunyuanVideo pipeline that ships with the package."""

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from xattn_video.pipelines.cpu_speed import cpu_has
from xattn_video.pipelines.demo.grammar import (
    BACKGROUNDS,
    COLOURS,
    MOTIONS,
    SHAPES,
    Scene,
    SceneObject,
    held_out_scenes,
    parse_prompt,
    sample_scene,
)

if TYPE_CHECKING:
    from diffusers import HunyuanVideoPipeline

__all__ = [
    "BACKGROUNDS",
    "COLOURS",
    "DEMO_DIR",
    "MOTIONS",
    "SHAPES",
    "Scene",
    "SceneObject",
    "default_dtype",
    "held_out_scenes",
    "load_demo_pipeline",
    "parse_prompt",
    "sample_scene",
]

DEMO_DIR = Path(__file__).parent / "model"


def load_demo_pipeline(
    dtype: torch.dtype | None = None, device: torch.device | str | None = None
) -> "HunyuanVideoPipeline":
    """Load the demo model from the package's own files; no network is used.

    Args:
        dtype: None means `default_dtype(device)`.
        device: None means a CUDA device if there is one, else the CPU.

    Raises:
        FileNotFoundError: The model's files are missing from the installation.
    """
    from diffusers import HunyuanVideoPipeline

    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if dtype is None:
        dtype = default_dtype(device)
    if not (DEMO_DIR / "model_index.json").is_file():
        raise FileNotFoundError(
            f"the demo model's files are missing, expected {DEMO_DIR / 'model_index.json'}; "
            "reinstall xattn-video, or train the model with scripts/train_demo_model.py."
        )
    pipeline = HunyuanVideoPipeline.from_pretrained(DEMO_DIR, dtype=dtype, local_files_only=True)
    return pipeline.to(device)


def default_dtype(device: torch.device | str) -> torch.dtype:
    """bfloat16 if the device supports it natively, else float32."""
    if torch.device(device).type == "cuda":
        return torch.bfloat16
    # float32 works everywhere.
    return torch.bfloat16 if cpu_has("avx512_bf16") else torch.float32
