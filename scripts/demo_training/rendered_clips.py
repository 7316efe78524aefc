"""Rendered clips and their latents."""

import random

import torch
from diffusers import AutoencoderKLHunyuanVideo
from torch import Tensor

from demo_training.training_plan import Size
from xattn_video.pipelines.demo.grammar import Scene, sample_scene
from xattn_video.pipelines.demo.rendering import place_objects, render_scene

CLIP_FRAMES = 65
# The VAE works on windows of 17 frames; each window begins with the last frame of the one before.
WINDOW_FRAMES = 17
WINDOW_STRIDE = 16


def render_clip(
    scene: Scene, rng: random.Random, size: Size, device: torch.device, dtype: torch.dtype
) -> Tensor:
    """One clip with a random placement: ``[3, 65, height, width]``."""
    placements = place_objects(scene, rng)
    height, width = size
    clip = render_scene(
        scene, placements, num_frames=CLIP_FRAMES, height=height, width=width, device=device
    )
    return clip.to(dtype)


def random_scene(rng: random.Random, *, held_out: bool = False) -> Scene:
    """A random scene for the VAE, with one or two objects at equal odds."""
    return sample_scene(rng, 1 + (rng.random() < 0.5), held_out=held_out)


def encode_windows(vae: AutoencoderKLHunyuanVideo, frames: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and log variance of ``[B, 3, 16 n + 1, H, W]``, with all windows as one batch.

    The same as the stock encoding with a temporal stride of 16, in one call.
    """
    batch = frames.shape[0]
    starts = range(0, frames.shape[2] - 1, WINDOW_STRIDE)
    windows = torch.cat([frames[:, :, start : start + WINDOW_FRAMES] for start in starts])
    moments = vae.quant_conv(vae.encoder(windows)).unflatten(0, (len(starts), batch))
    parts = [part if index == 0 else part[:, :, 1:] for index, part in enumerate(moments)]
    mean, log_variance = torch.cat(parts, dim=2).float().chunk(2, dim=1)
    return mean, log_variance.clamp(-30, 20)
