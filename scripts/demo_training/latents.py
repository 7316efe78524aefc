"""Pools of encoded clips with their encoded prompts, by frame size and number of objects."""

import random
import time
from dataclasses import dataclass

import torch
from diffusers import AutoencoderKLHunyuanVideo
from torch import Tensor

from demo_training.models import TextStack
from demo_training.rendered_clips import encode_windows, render_clip
from demo_training.training_plan import Size, TrainingJob
from xattn_video.pipelines.demo.grammar import sample_scene

# Of ten clips these have two objects; they are harder, so there are three of them.
TWO_OBJECT_CLIPS = (3, 6, 9)


@dataclass(frozen=True, slots=True)
class LatentPool:
    """Clips of one frame size and one number of objects.

    Attributes:
        latents: `[N, C, 17, h, w]`, float16.
        states: Prompt states `[N, L, C]`.
        pooled: Pooled states `[N, C']`.
    """

    latents: Tensor
    states: Tensor
    pooled: Tensor

    def batch(self, count: int, num_latent_frames: int) -> tuple[Tensor, Tensor, Tensor]:
        """The first frames of random clips, with their prompt states and pooled states."""
        index = torch.randint(len(self.latents), (count,), device=self.latents.device)
        return (
            self.latents[index, :, :num_latent_frames].float(),
            self.states[index],
            self.pooled[index],
        )


@torch.no_grad()
def fill_pools(
    job: TrainingJob,
    vae: AutoencoderKLHunyuanVideo,
    text: TextStack,
    rng: random.Random,
    size: Size,
    seconds: float,
) -> dict[int, LatentPool]:
    """Render and encode clips for ``seconds``; returns {number of objects: pool}."""
    latents: dict[int, list[Tensor]] = {1: [], 2: []}
    prompts: dict[int, list[str]] = {1: [], 2: []}
    area = (size[0] * size[1]) / (job.plan.square[0] * job.plan.square[1])
    batch = max(1, round(job.plan.encode_batch / area))
    begun, index = time.time(), 0
    while index < 4 or time.time() - begun < seconds:
        num_objects = 2 if index % 10 in TWO_OBJECT_CLIPS else 1
        index += 1
        scenes = [sample_scene(rng, num_objects) for _ in range(batch)]
        clips = torch.stack(
            [render_clip(scene, rng, size, job.device, job.dtype) for scene in scenes]
        )
        # Synchronised, or the queue on the device would exceed the time limit.
        if index % 4 == 0 and job.device.type == "cuda":
            torch.cuda.synchronize()
        mean, _ = encode_windows(vae, clips)
        latents[num_objects].append(mean.half())
        prompts[num_objects] += [scene.prompt for scene in scenes]
    pools = {
        count: LatentPool(torch.cat(latents[count]), *_encode_all(text, prompts[count], job))
        for count in (1, 2)
    }
    numbers = ", ".join(f"{len(pool.latents)} with {n} object(s)" for n, pool in pools.items())
    job.log(f"pool {size[1]}x{size[0]}: {numbers}; std {pools[1].latents.float().std():.3f}")
    return pools


def _encode_all(text: TextStack, prompts: list[str], job: TrainingJob) -> tuple[Tensor, Tensor]:
    """Prompt states and pooled states of prompts with the same token count."""
    parts = [
        text.encode(*text.tokenize(prompts[first : first + 256], job.device))
        for first in range(0, len(prompts), 256)
    ]
    states, pooled = (torch.cat(part) for part in zip(*parts, strict=True))
    return states, pooled
