"""HunyuanVideo: joint attention over the video tokens followed by the text tokens."""

import inspect
import itertools
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from diffusers import HunyuanVideoTransformer3DModel
from diffusers.models._modeling_parallel import ContextParallelInput, ContextParallelOutput
from torch import Tensor, nn

from xattn_video.policy.steps import ForwardInputs
from xattn_video.processors.families.family import Family
from xattn_video.processors.families.hunyuan_video_attention import attention
from xattn_video.processors.layout import TokenLayout

_ROTARY_ROWS = ContextParallelInput(split_dim=0, expected_dims=2, split_output=True)
HUNYUAN_VIDEO_PLAN: dict[str, Any] = {
    "rope": {0: _ROTARY_ROWS, 1: _ROTARY_ROWS},
    "transformer_blocks.0": {
        "hidden_states": ContextParallelInput(split_dim=1, expected_dims=3),
    },
    "proj_out": ContextParallelOutput(gather_dim=1, expected_dims=3),
}
"""For `enable_parallelism(cp_plan=...)`; only with an `XAttnProcessor`."""

_READ = ("hidden_states", "timestep", "encoder_hidden_states", "encoder_attention_mask")


def attentions(transformer: Any) -> dict[str, Any]:
    """{layer name: attention module} of all joint-attention layers, double-stream first."""
    return {
        f"{stack}.{number}": block.attn
        for stack in ("transformer_blocks", "single_transformer_blocks")
        for number, block in enumerate(getattr(transformer, stack))
    }


def read_forward(transformer: nn.Module, given: Mapping[str, Any]) -> ForwardInputs:
    """Read the arguments of a forward pass, in one transfer from the device.

    Raises:
        TypeError: An argument is missing.
    """
    for name in _READ:
        if not isinstance(given.get(name), Tensor):
            raise TypeError(
                f"XAttnProcessor reads {', '.join(_READ)} of every forward pass; this one was "
                f"called with {name}={given.get(name)!r}; pass a tensor, by name."
            )
    latents, timestep, text, mask = (given[name] for name in _READ)
    parts = (
        timestep.flatten()[:1],
        mask.sum(dim=1, dtype=torch.int),
        # Channel 0 of the last frame holds noisy latents in every variant of the model.
        latents[0, 0, -1].flatten()[:64],
        # One feature of every token, because prompts may begin alike.
        text[:, :, 0].flatten(),
    )
    read = torch.cat([part.detach().to(latents.device, torch.float32) for part in parts])
    values = iter(read.tolist())
    first, lengths, latent_sample, text_sample = (
        tuple(itertools.islice(values, len(part))) for part in parts
    )
    return ForwardInputs(
        timestep=first[0],
        timestep_dtype=timestep.dtype,
        latent_shape=tuple(latents.shape[1:]),
        latent_sample=latent_sample,
        text_sample=text_sample,
        text_lengths=tuple(int(length) for length in lengths),
        text_tokens=mask.shape[1],
        device=latents.device,
        dtype=latents.dtype,
        needs_grad=torch.is_grad_enabled() and _any_needs_grad(transformer, given.values()),
        lora_scale=(given.get("attention_kwargs") or {}).get("scale", 1.0),
    )


def layout(config: Any, inputs: ForwardInputs, device: torch.device) -> TokenLayout:
    """Video tokens in raster order, then the text."""
    frames, rows, columns = inputs.latent_shape[1:]
    grid = (
        frames // config.patch_size_t,
        rows // config.patch_size,
        columns // config.patch_size,
    )
    num_video_tokens = grid[0] * grid[1] * grid[2]
    return TokenLayout(num_video_tokens, inputs.text_tokens, inputs.text_lengths, device, grid)


def unsplit_reason(config: Any) -> str | None:
    """Why the video tokens cannot be split among ranks; None if they can."""
    if config.image_condition_type == "token_replace":
        return (
            'image_condition_type="token_replace" handles the tokens of the first frame '
            "separately and counts them from the first token of each rank; run on one GPU."
        )
    return None


def _any_needs_grad(transformer: nn.Module, given: Iterable[object]) -> bool:
    tensors = (one for one in given if isinstance(one, Tensor))
    return any(one.requires_grad for one in itertools.chain(tensors, transformer.parameters()))


HUNYUAN_VIDEO = Family(
    name="HunyuanVideo",
    transformers=(HunyuanVideoTransformer3DModel,),
    covers=("HunyuanVideo text-to-video", "HunyuanVideo image-to-video", "SkyReels-V1"),
    attentions=attentions,
    read_forward=read_forward,
    # From Diffusers' own class, because a derived or patched forward may take *args, **kwargs.
    forward_arguments=tuple(inspect.signature(HunyuanVideoTransformer3DModel.forward).parameters)[
        1:
    ],
    layout=layout,
    attention=attention,
    context_parallel_plan=HUNYUAN_VIDEO_PLAN,
    unsplit_reason=unsplit_reason,
)
