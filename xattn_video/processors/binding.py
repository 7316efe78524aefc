"""Ties a processor to its transformer when Diffusers sets it, and to each of its forward passes.

Diffusers tells a processor nothing when it is set. Importing this package therefore wraps
`AttentionMixin.set_attn_processor` of Diffusers: models given any other processor notice nothing;
a processor that derives from `TransformerBound` is told its transformer, before and after.
"""

import abc
import functools
from collections.abc import Callable
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.models.attention import AttentionMixin
from torch import nn

from xattn_video.errors import UnsupportedModelError
from xattn_video.processors.families import FAMILIES, Family


class TransformerBound(abc.ABC):
    """A processor that has to know the transformer it is set on."""

    @abc.abstractmethod
    def check_binding(self, transformer: Any) -> None:
        """Raise where the processor cannot be set on the transformer."""

    @abc.abstractmethod
    def bind(self, transformer: Any) -> Any:
        """Take up work on the transformer; harmless when done twice."""

    @abc.abstractmethod
    def unbind(self, transformer: Any) -> None:
        """Leave the transformer, which uses another processor now."""

    @abc.abstractmethod
    def serves(self, transformer: nn.Module) -> bool:
        """Whether a layer of the transformer uses the processor."""

    @abc.abstractmethod
    def begin_forward(
        self, transformer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """Prepare for a forward pass."""

    @abc.abstractmethod
    def end_forward(self, transformer: nn.Module) -> None:
        """Clear up after a forward pass, failed or not."""


class ForwardHook:
    """Tells a processor of a forward pass: before it starts, or after it has ended.

    A class, not a closure, so that it pickles, and so that a deep copy of the transformer brings
    hooks that belong to the copy's processor.
    """

    def __init__(self, processor: TransformerBound, begins: bool) -> None:
        self.processor = processor
        self.begins = begins

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __call__(
        self, transformer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *_: Any
    ) -> None:
        if not self.begins:
            self.processor.end_forward(transformer)
        elif self.processor.serves(transformer):
            self.processor.begin_forward(transformer, args, kwargs)
        else:
            self.processor.unbind(transformer)

    @classmethod
    def install(cls, processor: TransformerBound, transformer: nn.Module) -> None:
        """Register both hooks unless they are there."""
        if any(
            isinstance(hook, cls) and hook.processor is processor
            for hook in transformer._forward_pre_hooks.values()
        ):
            return
        transformer.register_forward_pre_hook(cls(processor, True), with_kwargs=True)
        transformer.register_forward_hook(
            cls(processor, False), with_kwargs=True, always_call=True
        )

    @classmethod
    def remove(cls, processor: TransformerBound, transformer: nn.Module) -> None:
        """Unregister, on a deep copy of the transformer too, which a hook's handle cannot."""
        for hooks in (transformer._forward_pre_hooks, transformer._forward_hooks):
            for number, hook in list(hooks.items()):
                if isinstance(hook, cls) and hook.processor is processor:
                    del hooks[number]
                    transformer._forward_pre_hooks_with_kwargs.pop(number, None)
                    transformer._forward_hooks_with_kwargs.pop(number, None)
                    transformer._forward_hooks_always_called.pop(number, None)


def unwrapped(model: Any) -> Any:
    """The model itself, out of the wrappers of torch.compile and PEFT.

    Raises:
        UnsupportedModelError: It is wrapped for data parallelism, which copies it.
    """
    while True:
        if hasattr(model, "_orig_mod"):
            model = model._orig_mod
        elif hasattr(model, "get_base_model"):
            model = model.get_base_model()
        elif isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            raise UnsupportedModelError(
                f"{type(model).__name__} copies its model for every device; give the model "
                "inside, model.module, and run one process for each GPU."
            )
        else:
            return model


def transformer_of(pipe_or_transformer: Any) -> Any:
    """The unwrapped transformer of a pipeline, or the one that was given.

    Raises:
        UnsupportedModelError: The pipeline has none.
    """
    if not isinstance(pipe_or_transformer, DiffusionPipeline):
        return unwrapped(pipe_or_transformer)
    if not hasattr(pipe_or_transformer, "transformer"):
        raise UnsupportedModelError(
            f"{type(pipe_or_transformer).__name__} has no transformer; supported are pipelines "
            "with a HunyuanVideoTransformer3DModel."
        )
    return unwrapped(pipe_or_transformer.transformer)


def family_of(model: Any) -> Family:
    """The family of an unwrapped model.

    Raises:
        UnsupportedModelError: No family knows it.
    """
    for family in FAMILIES:
        if isinstance(model, family.transformers):
            return family
    known = "; ".join(
        f"{', '.join(kind.__name__ for kind in family.transformers)} ({family.covers})"
        for family in FAMILIES
    )
    raise UnsupportedModelError(
        f"XAttnProcessor does not know the attention of {type(model).__name__}; supported is "
        f"{known}."
    )


def _bound_processors(model: AttentionMixin) -> list[TransformerBound]:
    """The distinct processors of the model that want to know it."""
    found = {id(p): p for p in model.attn_processors.values() if isinstance(p, TransformerBound)}
    return list(found.values())


def _binding(set_attn_processor: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(set_attn_processor)
    def set_and_bind(self: AttentionMixin, processor: Any) -> None:
        given = processor.values() if isinstance(processor, dict) else [processor]
        for one in given:
            if isinstance(one, type) and issubclass(one, TransformerBound):
                raise TypeError(
                    f"set_attn_processor takes an instance, got the class {one.__name__}; "
                    f"write {one.__name__}()."
                )
            if isinstance(one, TransformerBound):
                one.check_binding(self)
        before = _bound_processors(self)
        set_attn_processor(self, processor)
        after = _bound_processors(self)
        for one in before:
            if not any(one is kept for kept in after):
                one.unbind(self)
        for one in after:
            one.bind(self)

    set_and_bind._binds_xattn = True  # type: ignore[attr-defined]
    return set_and_bind


def install() -> None:
    """Wrap `set_attn_processor` once, wherever Diffusers defines it."""
    for owner in (AttentionMixin, *(kind for family in FAMILIES for kind in family.transformers)):
        original = vars(owner).get("set_attn_processor")
        if original is not None and not hasattr(original, "_binds_xattn"):
            owner.set_attn_processor = _binding(original)
