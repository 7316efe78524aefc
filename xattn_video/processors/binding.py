"""Binds a processor to its transformer when Diffusers sets it, and to each forward pass.

Diffusers does not tell a processor which transformer it is set on. Importing this package
therefore wraps Diffusers' `AttentionMixin.set_attn_processor`. A processor that derives from
`TransformerBound` is then told its transformer; other processors work as before.
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
    """A processor that must know the transformer it is set on."""

    @abc.abstractmethod
    def check_binding(self, transformer: Any) -> None:
        """Raise if the processor cannot be set on the transformer."""

    @abc.abstractmethod
    def bind(self, transformer: Any) -> Any:
        """Start serving the transformer. A second call changes nothing."""

    @abc.abstractmethod
    def unbind(self, transformer: Any) -> None:
        """Stop serving the transformer, which now uses another processor."""

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
        """Clean up after a forward pass, even a failed one."""


class ForwardHook:
    """Tells a processor that a forward pass begins or ends.

    This is a class, not a closure, so that it can be pickled and a deep copy of the transformer
    has hooks that belong to the copy's processor.
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
        """Register both hooks unless they are registered already."""
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
        """Remove both hooks; unlike a hook's handle, this also works on a deep copy."""
        for hooks in (transformer._forward_pre_hooks, transformer._forward_hooks):
            for number, hook in list(hooks.items()):
                if isinstance(hook, cls) and hook.processor is processor:
                    del hooks[number]
                    transformer._forward_pre_hooks_with_kwargs.pop(number, None)
                    transformer._forward_hooks_with_kwargs.pop(number, None)
                    transformer._forward_hooks_always_called.pop(number, None)


def unwrapped(model: Any) -> Any:
    """The model without the wrappers of torch.compile and PEFT.

    Raises:
        UnsupportedModelError: The model is wrapped for data parallelism, which copies it.
    """
    while True:
        if hasattr(model, "_orig_mod"):
            model = model._orig_mod
        elif hasattr(model, "get_base_model"):
            model = model.get_base_model()
        elif isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            raise UnsupportedModelError(
                f"{type(model).__name__} copies its model to every device; pass the "
                "inner model, model.module, and run one process for each GPU."
            )
        else:
            return model


def transformer_of(pipe_or_transformer: Any) -> Any:
    """The unwrapped transformer of a pipeline, or the given transformer, unwrapped.

    Raises:
        UnsupportedModelError: The pipeline has none.
    """
    if not isinstance(pipe_or_transformer, DiffusionPipeline):
        return unwrapped(pipe_or_transformer)
    if not hasattr(pipe_or_transformer, "transformer"):
        raise UnsupportedModelError(
            f"{type(pipe_or_transformer).__name__} has no transformer; use a pipeline with a "
            "HunyuanVideoTransformer3DModel."
        )
    return unwrapped(pipe_or_transformer.transformer)


def family_of(model: Any) -> Family:
    """The family of an unwrapped model.

    Raises:
        UnsupportedModelError: The model belongs to no family.
    """
    for family in FAMILIES:
        if isinstance(model, family.transformers):
            return family
    known = "; ".join(
        f"{', '.join(kind.__name__ for kind in family.transformers)} ({', '.join(family.covers)})"
        for family in FAMILIES
    )
    raise UnsupportedModelError(
        f"XAttnProcessor does not support {type(model).__name__}; supported models: {known}; "
        "for language, give enable_xattention a model that transformers has loaded."
    )


def _bound_processors(model: AttentionMixin) -> list[TransformerBound]:
    """The distinct processors of the model that must know it."""
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
    """Wrap `set_attn_processor` once in each class of Diffusers that defines it."""
    for owner in (AttentionMixin, *(kind for family in FAMILIES for kind in family.transformers)):
        original = vars(owner).get("set_attn_processor")
        if original is not None and not hasattr(original, "_binds_xattn"):
            owner.set_attn_processor = _binding(original)
