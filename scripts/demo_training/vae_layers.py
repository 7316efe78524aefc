"""Versions of the VAE's layers that train fast on a GPU and compute the same.

PyTorch's group norm uses one of a GPU's multiprocessors for each group of each clip: two clips of
four groups keep eight of 132 busy. Its replicating padding accumulates gradients atomically, and
its convolutions are fast with channels last, which Diffusers' residual blocks undo.
"""

from functools import partial
from typing import Any

import torch
from diffusers import AutoencoderKLHunyuanVideo
from diffusers.models.autoencoders.autoencoder_kl_hunyuan_video import (
    HunyuanVideoCausalConv3d,
    HunyuanVideoResnetBlockCausal3D,
)
from torch import Tensor, nn

_SPACE = (2, 3, 4)  # frames, height, width


def use_training_layers(vae: AutoencoderKLHunyuanVideo) -> None:
    """Replace the residual blocks, group norms and padded convolutions of ``vae`` by these."""
    for module in vae.modules():
        if isinstance(module, nn.GroupNorm):
            module.forward = partial(_normalise, module)
        elif isinstance(module, HunyuanVideoCausalConv3d):
            module.forward = partial(_convolve, module)
        elif isinstance(module, HunyuanVideoResnetBlockCausal3D):
            module.forward = partial(_residual_block, module)


def _residual_block(block: HunyuanVideoResnetBlockCausal3D, x: Tensor) -> Tensor:
    """The stock block, in the memory format of ``x``; its dropout is 0."""
    residual = x if block.conv_shortcut is None else block.conv_shortcut(x)
    x = block.conv1(block.nonlinearity(block.norm1(x)))
    return block.conv2(block.nonlinearity(block.norm2(x))) + residual


def _normalise(norm: nn.GroupNorm, x: Tensor) -> Tensor:
    normed: Tensor = GroupNorm.apply(x, norm.weight, norm.bias, norm.num_groups, norm.eps)
    return normed


def _convolve(module: HunyuanVideoCausalConv3d, x: Tensor) -> Tensor:
    if any(module.time_causal_padding):
        x = ReplicatePad.apply(x, module.time_causal_padding, _memory_format(module.conv.weight))
    convolved: Tensor = module.conv(x)
    return convolved


class GroupNorm(torch.autograd.Function):
    """`torch.nn.functional.group_norm` of clips, from sums over each channel."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, num_groups: int, eps: float
    ) -> Tensor:
        """Normalise ``x`` `[B, C, T, H, W]`."""
        count = x[0].numel() // num_groups
        mean = _group_sums(x.sum(_SPACE, dtype=torch.float32), num_groups) / count
        squares = torch.linalg.vector_norm(x, dim=_SPACE, dtype=torch.float32).square()
        variance = (_group_sums(squares, num_groups) / count - mean.square()).clamp(min=0)
        # [B, C] in float32, as everything below.
        mean, rstd = (_by_channel(part, x) for part in (mean, (variance + eps).rsqrt()))
        scale = rstd * weight
        ctx.save_for_backward(x, weight, mean, rstd)
        ctx.num_groups, ctx.count = num_groups, count
        return _affine(x, scale, bias - mean * scale)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of ``x``, ``weight`` and ``bias``."""
        x, weight, mean, rstd = ctx.saved_tensors
        of_bias = gradient.sum(_SPACE, dtype=torch.float32)
        with_x = (gradient * x).sum(_SPACE, dtype=torch.float32)
        of_weight = (with_x - mean * of_bias) * rstd
        # Means over each group of the gradient and of its product with the normalised input.
        level, slope = (
            _by_channel(_group_sums(part * weight, ctx.num_groups) / ctx.count, x)
            for part in (of_bias, of_weight)
        )
        rest = x * _spread(-rstd.square() * slope)
        rest += _spread(rstd * (mean * rstd * slope - level))
        of_input = torch.addcmul(rest, gradient, _spread(rstd * weight), out=torch.empty_like(x))
        return of_input, of_weight.sum(0).to(weight), of_bias.sum(0).to(weight), None, None


def _group_sums(by_channel: Tensor, num_groups: int) -> Tensor:
    """`[B, C]` to `[B, groups]`."""
    return by_channel.unflatten(1, (num_groups, -1)).sum(-1)


def _by_channel(by_group: Tensor, x: Tensor) -> Tensor:
    """`[B, groups]` to `[B, C]`."""
    return by_group.repeat_interleave(x.shape[1] // by_group.shape[1], dim=1)


def _spread(by_channel: Tensor) -> Tensor:
    """`[B, C]` as `[B, C, 1, 1, 1]`."""
    return by_channel[:, :, None, None, None]


def _affine(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """``x`` * scale + shift, computed in float32 and stored in the dtype of ``x``."""
    return torch.addcmul(_spread(shift), x, _spread(scale), out=torch.empty_like(x))


class ReplicatePad(torch.autograd.Function):
    """`torch.nn.functional.pad(mode="replicate")` of clips."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, padding: tuple[int, ...], memory_format: torch.memory_format
    ) -> Tensor:
        """Pad ``x`` `[B, C, T, H, W]` by (left, right, top, bottom, before, after)."""
        ctx.padding, ctx.memory_format = padding, _memory_format(x)
        shape = [*x.shape[:2]]
        for size, before, after in zip(x.shape[2:], *_sides(padding), strict=True):
            shape.append(before + size + after)
        padded = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=memory_format)
        _inside(padded, padding).copy_(x)
        for dim, before, after in zip(_SPACE, *_sides(padding), strict=True):
            end = padded.shape[dim] - after
            if before:
                padded.narrow(dim, 0, before).copy_(padded.narrow(dim, before, 1))
            if after:
                padded.narrow(dim, end, after).copy_(padded.narrow(dim, end - 1, 1))
        return padded

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        """Add the padding's gradient to the edges, in place: ``gradient`` is used nowhere else."""
        for dim, before, after in zip(_SPACE, *_sides(ctx.padding), strict=True):
            end = gradient.shape[dim] - after
            if before:
                edge = gradient.narrow(dim, before, 1)
                edge += gradient.narrow(dim, 0, before).sum(dim, keepdim=True)
            if after:
                edge = gradient.narrow(dim, end - 1, 1)
                edge += gradient.narrow(dim, end, after).sum(dim, keepdim=True)
        inside = _inside(gradient, ctx.padding)
        return inside.contiguous(memory_format=ctx.memory_format), None, None


def _sides(padding: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Padding before and after, for frames, height and width."""
    left, right, top, bottom, before, after = padding
    return (before, top, left), (after, bottom, right)


def _inside(padded: Tensor, padding: tuple[int, ...]) -> Tensor:
    for dim, before, after in zip(_SPACE, *_sides(padding), strict=True):
        padded = padded.narrow(dim, before, padded.shape[dim] - before - after)
    return padded


def _memory_format(x: Tensor) -> torch.memory_format:
    is_last = x.is_contiguous(memory_format=torch.channels_last_3d)
    return torch.channels_last_3d if is_last else torch.contiguous_format
