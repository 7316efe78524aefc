"""A HunyuanVideo pipeline with random weights that runs in seconds, saved as a folder."""

from pathlib import Path

import pytest
import torch
from diffusers import (
    AutoencoderKLHunyuanVideo,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideoPipeline,
    HunyuanVideoTransformer3DModel,
)

SCRIPTS = Path(__file__).parents[1] / "scripts"
HEADS, HEAD_DIM = 2, 16
DOUBLE_LAYERS, SINGLE_LAYERS = 1, 2
LAYERS = DOUBLE_LAYERS + SINGLE_LAYERS


def save_tiny_pipeline(folder: Path) -> None:
    """Build the pipeline and write it with `save_pretrained`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(SCRIPTS))
        from demo_training.models import build_text_stack

    torch.manual_seed(0)
    text = build_text_stack()
    transformer = HunyuanVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=HEADS,
        attention_head_dim=HEAD_DIM,
        num_layers=DOUBLE_LAYERS,
        num_single_layers=SINGLE_LAYERS,
        num_refiner_layers=1,
        mlp_ratio=2.0,
        text_embed_dim=text.text_encoder.config.hidden_size,
        pooled_projection_dim=text.text_encoder_2.config.hidden_size,
        rope_axes_dim=(4, 6, 6),
    )
    vae = AutoencoderKLHunyuanVideo(
        latent_channels=4,
        block_out_channels=(8, 8, 8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        mid_block_add_attention=False,
    )
    HunyuanVideoPipeline(
        text_encoder=text.text_encoder,
        tokenizer=text.tokenizer,
        transformer=transformer,
        vae=vae,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
        text_encoder_2=text.text_encoder_2,
        tokenizer_2=text.tokenizer_2,
    ).save_pretrained(folder)
