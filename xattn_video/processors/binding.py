"""Ties a processor to its transformer when Diffusers sets it.

Diffusers tells a processor nothing when it is set. Importing this package therefore wraps
`AttentionMixin.set_attn_processor` of Diffusers: models given any other processor notice nothing;
a processor that derives from `TransformerBound` is told its transformer, before and after.
"""

import abc
import functools
from collections.abc import Callable
from typing import Any

from diffusers import HunyuanVideoTransformer3DModel
from diffusers.models.attention import AttentionMixin

from xattn_video.errors import UnsupportedModelError


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


def supported_transformer(model: Any) -> Any:
    """The model itself, out of its torch.compile wrapper.

    Raises:
        UnsupportedModelError: It is not a HunyuanVideo transformer.
    """
    model = getattr(model, "_orig_mod", model)
    if not isinstance(model, HunyuanVideoTransformer3DModel):
        raise UnsupportedModelError(
            f"XAttnProcessor does not know the attention of {type(model).__name__}; supported is "
            "HunyuanVideoTransformer3DModel (HunyuanVideo text-to-video, image-to-video, "
            "SkyReels-V1)."
        )
    return model


def _bound_processors(model: AttentionMixin) -> list[TransformerBound]:
    """The distinct processors of the model that want to know it."""
    found = {id(p): p for p in model.attn_processors.values() if isinstance(p, TransformerBound)}
    return list(found.values())


def _binding(set_attn_processor: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(set_attn_processor)
    def set_and_bind(self: AttentionMixin, processor: Any) -> None:
        given = processor.values() if isinstance(processor, dict) else [processor]
        for one in given:
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
    for owner in (AttentionMixin, HunyuanVideoTransformer3DModel):
        original = vars(owner).get("set_attn_processor")
        if original is not None and not hasattr(original, "_binds_xattn"):
            owner.set_attn_processor = _binding(original)
