"""The VAE's causal 3-D convolution as one 2-D convolution, for training.

With few channels a 3-D convolution leaves the GPU's matrix units idle. Stacking the three frames
that a kernel sees on the channel axis gives the same sum to a 2-D convolution, in channels-last
memory. The parameters stay those of the model, so nothing has to be converted afterwards.
"""

import functools
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.autoencoder_kl_hunyuan_video import HunyuanVideoCausalConv3d
from torch import Tensor, nn

TAPS = 3


def use_stacked_convolutions(model: nn.Module) -> None:
    """Compute every causal 3x3x3 convolution of ``model`` as a 2-D one."""
    for module in model.modules():
        if isinstance(module, HunyuanVideoCausalConv3d) and _can_stack(module):
            module.forward = functools.partial(stacked_convolution, module.conv)


def use_stock_convolutions(model: nn.Module) -> None:
    """Undo `use_stacked_convolutions`."""
    for module in model.modules():
        if isinstance(module, HunyuanVideoCausalConv3d):
            module.__dict__.pop("forward", None)


def use_faster_convolutions(
    model: nn.Module, run: Callable[[], object], repeats: int
) -> dict[str, float]:
    """Time ``run`` with both kinds of convolution, keep the faster; gives ms for each."""
    milliseconds = {}
    kinds = {"stock": use_stock_convolutions, "stacked": use_stacked_convolutions}
    for name, use in kinds.items():
        use(model)
        # The first runs also choose among cuDNN's algorithms.
        _time_ms(run, repeats=max(1, repeats // 3))
        milliseconds[name] = _time_ms(run, repeats)
    kinds[min(milliseconds, key=lambda name: milliseconds[name])](model)
    return milliseconds


def stacked_convolution(conv: nn.Conv3d, hidden_states: Tensor) -> Tensor:
    """Causal convolution of ``[B, C, T, H, W]`` with replicated edges, as the stock module's."""
    batch = hidden_states.shape[0]
    stacked = _StackTaps.apply(hidden_states, conv.stride[0])
    weight = conv.weight.transpose(1, 2).flatten(1, 2)
    weight = weight.contiguous(memory_format=torch.channels_last)
    output = F.conv2d(stacked, weight, conv.bias, stride=conv.stride[1:])
    return output.unflatten(0, (batch, -1)).transpose(1, 2)


def _time_ms(run: Callable[[], object], repeats: int) -> float:
    _synchronize()
    begun = time.perf_counter()
    for _ in range(repeats):
        run()
    _synchronize()
    return (time.perf_counter() - begun) / repeats * 1e3


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _can_stack(module: HunyuanVideoCausalConv3d) -> bool:
    conv = module.conv
    return (
        module.pad_mode == "replicate"
        and conv.kernel_size == (TAPS, TAPS, TAPS)
        and conv.padding == (0, 0, 0)
        and conv.dilation == (1, 1, 1)
        and conv.groups == 1
    )


def _tap_frames(tap: int, stride: int, num_outputs: int) -> tuple[int, slice]:
    """How many output frames see the repeated first frame, and which frames the others see."""
    num_repeated = min(num_outputs, -((tap - (TAPS - 1)) // stride))
    first = num_repeated * stride + tap - (TAPS - 1)
    last = first + (num_outputs - num_repeated - 1) * stride
    return num_repeated, slice(first, last + 1, stride)


class _StackTaps(torch.autograd.Function):
    """`[B, C, T, H, W]` to `[B * T', 3 * C, H + 2, W + 2]`, edges replicated."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, stride: int) -> Tensor:
        B, C, T, H, W = x.shape
        num_outputs = (T - 1) // stride + 1
        ctx.stride, ctx.input_shape = stride, x.shape
        stacked = x.new_empty(B * num_outputs, H + 2, W + 2, TAPS * C).permute(0, 3, 1, 2)
        taps = stacked.view(B, num_outputs, TAPS, C, H + 2, W + 2)
        inner = taps[..., 1:-1, 1:-1]
        frames = x.transpose(1, 2)
        for tap in range(TAPS):
            num_repeated, seen = _tap_frames(tap, stride, num_outputs)
            inner[:, :num_repeated, tap] = frames[:, :1]
            if num_repeated < num_outputs:
                inner[:, num_repeated:, tap] = frames[:, seen]
        stacked[..., 0, :] = stacked[..., 1, :]
        stacked[..., -1, :] = stacked[..., -2, :]
        stacked[..., 0] = stacked[..., 1]
        stacked[..., -1] = stacked[..., -2]
        return stacked

    @staticmethod
    def backward(ctx: Any, grad_stacked: Tensor) -> tuple[Tensor, None]:
        B, C, T, H, W = ctx.input_shape
        num_outputs = (T - 1) // ctx.stride + 1
        taps = grad_stacked.view(B, num_outputs, TAPS, C, H + 2, W + 2)
        grad = taps.new_zeros(B, T, H + 2, W + 2, C).permute(0, 1, 4, 2, 3)
        for tap in range(TAPS):
            num_repeated, seen = _tap_frames(tap, ctx.stride, num_outputs)
            if num_repeated:
                grad[:, 0] += taps[:, :num_repeated, tap].sum(1)
            if num_repeated < num_outputs:
                grad[:, seen] += taps[:, num_repeated:, tap]
        grad[..., 1] += grad[..., 0]
        grad[..., -2] += grad[..., -1]
        grad[..., 1, :] += grad[..., 0, :]
        grad[..., -2, :] += grad[..., -1, :]
        return grad[..., 1:-1, 1:-1].transpose(1, 2), None
