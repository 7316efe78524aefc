"""Context parallelism: several GPUs share one video, through Diffusers' own hooks.

Diffusers splits the video tokens among the ranks before the first block and gathers them after
the last; in between, the layers trade tokens for heads (`xattn_video.processors.head_exchange`).
Every rank holds the whole text, because the mask of joint attention covers the end of the tokens.
"""

from contextlib import ExitStack
from typing import Any

import torch
import torch.distributed as dist
from diffusers import ContextParallelConfig
from diffusers.hooks import apply_context_parallel
from diffusers.hooks.context_parallel import ContextParallelGatherHook
from diffusers.models._modeling_parallel import ParallelConfig
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from xattn_video.errors import UnsupportedModelError
from xattn_video.processors.binding import family_of, transformer_of
from xattn_video.processors.families import Family
from xattn_video.processors.families.hunyuan_video import HUNYUAN_VIDEO_PLAN
from xattn_video.processors.head_exchange import HeadExchange
from xattn_video.processors.layout import TokenLayout

__all__ = ["HUNYUAN_VIDEO_PLAN", "disable_context_parallel", "enable_context_parallel"]

# With these caches each rank would decide alone, by its own tokens, whether to skip blocks.
_DECIDING_CACHES = {"FirstBlockCacheConfig", "SeaCacheConfig"}
_HOOK_NAMES = ("cp_input---", "cp_output---")


def enable_context_parallel(pipe_or_transformer: Any, degree: int | None = None) -> None:
    """Let the ranks of `torch.distributed` share each video; call it on every rank.

    An `XAttnProcessor` computes the attention; set it before or after. Any number of video tokens
    can be split. This also cleans up after a failed `enable_parallelism` of Diffusers.

    Args:
        pipe_or_transformer: A HunyuanVideo pipeline, or its transformer.
        degree: Number of neighbouring ranks that share a video; it divides the number of ranks.
            None means all ranks.

    Raises:
        RuntimeError: `torch.distributed` is not initialised, or context parallelism is already on.
        ValueError: The degree is below 2, or does not divide the ranks or the heads.
        UnsupportedModelError: The model cannot be split.
    """
    transformer = transformer_of(pipe_or_transformer)
    family = family_of(transformer)
    if not dist.is_available() or not dist.is_initialized():
        raise RuntimeError(
            "context parallelism needs torch.distributed; start the script with torchrun "
            '--nproc-per-node N and call torch.distributed.init_process_group("nccl") first.'
        )
    if is_split(transformer):
        raise RuntimeError(
            "context parallelism is already enabled on this transformer; call "
            "disable_context_parallel(transformer) first."
        )
    num_ranks = dist.get_world_size()
    degree = num_ranks if degree is None else degree
    if degree < 2 or num_ranks % degree:
        raise ValueError(
            f"degree must be at least 2 and divide the number of ranks, got degree={degree} with "
            f"{num_ranks} ranks; use {_or(_divisors(num_ranks)[1:]) or 'more ranks'}."
        )
    check_splits(transformer, family, degree)
    config = _parallel_config(degree)
    disable_context_parallel(transformer)
    with ExitStack() as undo:
        undo.callback(disable_context_parallel, transformer)
        transformer._parallel_config = config
        apply_context_parallel(
            transformer, config.context_parallel_config, family.context_parallel_plan
        )
        if dist.get_backend() == "gloo":
            _pad_gathers(transformer)
        undo.pop_all()


def disable_context_parallel(pipe_or_transformer: Any) -> None:
    """Let every rank compute whole videos again; does nothing if context parallelism is off."""
    transformer = transformer_of(pipe_or_transformer)
    if getattr(transformer._parallel_config, "context_parallel_config", None) is None:
        return
    transformer._parallel_config = None
    for processor in transformer.attn_processors.values():
        # Diffusers set it on the processors that were in use.
        if getattr(processor, "_parallel_config", None) is not None:
            processor._parallel_config = None
    for module in transformer.modules():
        registry: Any = getattr(module, "_diffusers_hook", None)
        for name in _split_hooks(module):
            registry.remove_hook(name, recurse=False)


def is_split(transformer: nn.Module) -> bool:
    """Whether tokens are split; False after a failed `enable_parallelism`."""
    return any(_split_hooks(module) for module in transformer.modules())


def ranks_of_tokens(transformer: Any) -> Any:
    """The process group that shares the tokens of a split transformer."""
    return transformer._parallel_config.context_parallel_config._ulysses_mesh.get_group()


def offer_plan(transformer: Any, family: Family) -> None:
    """Make Diffusers' `enable_parallelism` work without a plan, also after it has failed."""
    transformer._cp_plan = family.context_parallel_plan
    if not is_split(transformer):
        disable_context_parallel(transformer)


def withdraw_plan(transformer: Any, family: Family) -> None:
    """Undo `offer_plan`, because Diffusers' own processor computes wrong results with it."""
    if vars(transformer).get("_cp_plan") == family.context_parallel_plan:
        del transformer._cp_plan


def exchange_of(
    transformer: Any, family: Family, layout: TokenLayout, needs_grad: bool = False
) -> HeadExchange | None:
    """The exchange of the layers in a forward pass; None without context parallelism.

    Raises:
        ValueError, UnsupportedModelError, NotImplementedError: The forward pass cannot be split
            with these settings.
    """
    config = getattr(transformer._parallel_config, "context_parallel_config", None)
    if config is None:
        return None
    if needs_grad:
        raise NotImplementedError(
            "gradients are not computed under context parallelism; run within "
            "torch.no_grad(), or call disable_context_parallel(transformer)."
        )
    if config.ring_degree > 1:
        raise NotImplementedError(
            "ring attention is not supported, got ring_degree="
            f"{config.ring_degree}: blocks are selected from all keys of a row, but a ring sees "
            "only a part of them at a time; use ContextParallelConfig(ulysses_degree=N)."
        )
    degree, num_video = config.ulysses_degree, layout.num_video_tokens
    check_splits(transformer, family, degree)
    if num_video % degree and not config.ulysses_anything:
        raise ValueError(
            f"{num_video} video tokens cannot be divided evenly among {degree} ranks; use "
            "ContextParallelConfig(ulysses_degree=..., ulysses_anything=True), or "
            "enable_context_parallel(transformer)."
        )
    group = config._ulysses_mesh.get_group()
    return HeadExchange(
        group,
        dist.get_rank(group),
        degree,
        transformer.config.num_attention_heads,
        num_video,
        layout.num_text_tokens,
    )


def check_splits(transformer: Any, family: Family, degree: int) -> None:
    """Raise if the model's tokens or heads cannot be split over ``degree`` ranks."""
    reason = family.unsplit_reason(transformer.config)
    if reason is not None:
        raise UnsupportedModelError(f"context parallelism is not supported: {reason}")
    num_heads = transformer.config.num_attention_heads
    if num_heads % degree:
        raise ValueError(
            f"{num_heads} heads cannot be divided evenly among {degree} ranks; use "
            f"{_or(_divisors(num_heads)[1:])} ranks."
        )
    cache = type(getattr(transformer, "_cache_config", None)).__name__
    if cache in _DECIDING_CACHES:
        raise NotImplementedError(
            f"context parallelism cannot be used with {cache}: each rank would decide from its "
            "own tokens whether to skip blocks; call transformer.disable_cache()."
        )


class PaddedGatherHook(ContextParallelGatherHook):  # type: ignore[misc]
    """Diffusers' hook for gloo, which gathers equal parts only: pads parts, then cuts them."""

    def post_forward(self, module: nn.Module, output: Tensor) -> Tensor:
        (place,) = self.metadata
        group = self.parallel_config._flattened_mesh.get_group()
        own = output.new_tensor([output.shape[place.gather_dim]], dtype=torch.long)
        sizes = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
        dist.all_gather(sizes, own, group=group)
        shape = list(output.shape)
        shape[place.gather_dim] = int(max(sizes))
        padded = output.new_zeros(shape)
        padded.narrow(place.gather_dim, 0, int(own)).copy_(output)
        parts = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(parts, padded, group=group)
        cut = [
            part.narrow(place.gather_dim, 0, int(size))
            for part, size in zip(parts, sizes, strict=True)
        ]
        return torch.cat(cut, place.gather_dim)


def _pad_gathers(transformer: nn.Module) -> None:
    """Replace Diffusers' hooks that gather tokens by `PaddedGatherHook`."""
    for module in transformer.modules():
        registry: Any = getattr(module, "_diffusers_hook", None)
        for name in _split_hooks(module):
            hook = registry.get_hook(name)
            if isinstance(hook, ContextParallelGatherHook):
                registry.remove_hook(name, recurse=False)
                padded = PaddedGatherHook(hook.metadata, hook.parallel_config)
                registry.register_hook(padded, name)


def _parallel_config(degree: int) -> ParallelConfig:
    """Diffusers' configuration over groups of ``degree`` neighbouring ranks."""
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    accelerator = torch.accelerator.current_accelerator()
    device = torch.device("cpu")
    if accelerator is not None:
        device = torch.device(accelerator.type, torch.accelerator.current_device_index())
    mesh = init_device_mesh(
        device.type,
        (num_ranks // degree, 1, degree),
        mesh_dim_names=("videos", "ring", "ulysses"),
    )
    config = ParallelConfig(
        context_parallel_config=ContextParallelConfig(
            ulysses_degree=degree, ulysses_anything=True, mesh=mesh
        )
    )
    config.setup(rank, num_ranks, device, mesh=mesh)
    return config


def _split_hooks(module: nn.Module) -> list[str]:
    """Diffusers' hooks on the module that split or gather tokens."""
    hooks = getattr(getattr(module, "_diffusers_hook", None), "hooks", {})
    return [name for name in hooks if name.startswith(_HOOK_NAMES)]


def _divisors(number: int) -> list[int]:
    return [part for part in range(1, number + 1) if number % part == 0]


def _or(numbers: list[int]) -> str:
    """The numbers as text, such as "2, 3 or 4"."""
    words = [str(number) for number in numbers]
    return " or ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)
