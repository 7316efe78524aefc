"""Switch XAttention on and off for a video transformer in one line."""

from contextlib import AbstractContextManager
from typing import Any

from diffusers import DiffusionPipeline

from xattn_video.policy.report import SparsityReport
from xattn_video.policy.schedule import ThresholdLike
from xattn_video.policy.settings import SparseSettings
from xattn_video.processors.binding import family_of, transformer_of
from xattn_video.processors.processor import XAttnProcessor


class XAttentionHandle(AbstractContextManager["XAttentionHandle"]):
    """XAttention on one transformer, until `disable` or the end of a ``with`` block.

    Attributes:
        processor: The `XAttnProcessor` in use; its report stays available after `disable`.
    """

    def __init__(self, transformer: Any, processor: XAttnProcessor) -> None:
        self.processor = processor
        self._transformer = transformer
        self._previous: dict[str, Any] | None = dict(transformer.attn_processors)

    def report(self) -> SparsityReport:
        """What ran in the latest generation; also works after `disable`."""
        return self.processor.report()

    def disable(self) -> None:
        """Restore the previous processors. A second call does nothing."""
        if self._previous is not None:
            self._transformer.set_attn_processor(self._previous)
            self._previous = None

    def __enter__(self) -> "XAttentionHandle":
        if self._previous is None:
            raise RuntimeError("this handle was disabled; call enable_xattention again.")
        return self

    def __exit__(self, *exception: object) -> None:
        self.disable()


def enable_on_transformer(
    pipe_or_transformer: Any,
    threshold: "ThresholdLike | SparseSettings | None" = None,
    **options: Any,
) -> XAttentionHandle:
    """Set an `XAttnProcessor` on a pipeline's transformer.

    Args:
        pipe_or_transformer: A pipeline with a HunyuanVideo transformer, or the transformer. Only
            a pipeline knows the number of steps, which ``cooldown_steps`` needs.
        threshold: As in `XAttnProcessor`: a threshold, a schedule or a whole `SparseSettings`.
        options: The other arguments of `XAttnProcessor`.

    Returns:
        A handle with ``processor``, ``report()`` and ``disable()``; also a context manager.

    Raises:
        UnsupportedModelError: The argument has no HunyuanVideo transformer.
        RuntimeError: XAttention is already enabled on the transformer.
        ValueError, TypeError: A setting is out of range or of a wrong type.
    """
    transformer = transformer_of(pipe_or_transformer)
    family_of(transformer)
    if any(isinstance(p, XAttnProcessor) for p in transformer.attn_processors.values()):
        raise RuntimeError(
            "XAttention is already enabled on this transformer; call disable() on its handle "
            "first, or set another XAttnProcessor with transformer.set_attn_processor. To use the "
            "present processor with another pipeline, call "
            "processor.bind(pipe.transformer, pipeline=pipe)."
        )
    processor = XAttnProcessor(threshold, **options)
    handle = XAttentionHandle(transformer, processor)
    transformer.set_attn_processor(processor)
    if isinstance(pipe_or_transformer, DiffusionPipeline):
        processor.bind(transformer, pipeline=pipe_or_transformer)
    return handle
