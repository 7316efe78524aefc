"""`enable_xattention`: one function for video transformers and for language models."""

import sys
from typing import TYPE_CHECKING, Any

from xattn_video.policy.schedule import ThresholdLike
from xattn_video.policy.settings import SparseSettings

if TYPE_CHECKING:
    from xattn_video.language.registration import LanguageHandle
    from xattn_video.processors.enable import XAttentionHandle


def enable_xattention(
    model: Any,
    threshold: "ThresholdLike | SparseSettings | None" = None,
    **options: Any,
) -> "XAttentionHandle | LanguageHandle":
    """Switch sparse attention on in a Diffusers pipeline, its transformer, or a language model.

    Args:
        model: A pipeline with a HunyuanVideo transformer, the transformer, or a model of
            transformers with causal attention, such as Llama or Qwen2-VL, or its pipeline. Only
            Diffusers' pipeline knows the number of steps, which ``cooldown_steps`` needs.
        threshold: A threshold, a schedule or a whole `SparseSettings`. By default 0.95 for video
            and 0.9 for language.
        options: For video the other arguments of `XAttnProcessor`; for language those of
            `register_attention`, such as ``stride`` and ``dense_layers``.

    Returns:
        A handle with ``report()`` and ``disable()``; also a context manager.

    Raises:
        UnsupportedModelError: The model is of neither kind.
        RuntimeError: XAttention is already enabled on the model.
        ValueError, TypeError: A setting is out of range or of a wrong type.
    """
    if isinstance(model, type):
        raise TypeError(
            f"model must be an instance, got the class {model.__name__}; use "
            f"{model.__name__}.from_pretrained(...) first."
        )
    language_model = _language_model(model)
    if language_model is not None:
        from xattn_video.language.registration import enable_prefill

        return enable_prefill(language_model, threshold, **options)
    from xattn_video.processors.enable import enable_on_transformer

    return enable_on_transformer(model, threshold, **options)


def _language_model(model: Any) -> Any:
    """The transformers model in a pipeline or a wrapper of torch.compile or PEFT, or None."""
    # No transformers model can exist before this module is imported.
    modeling = sys.modules.get("transformers.modeling_utils")
    if modeling is None:
        return None
    pipelines = sys.modules.get("transformers.pipelines.base")
    if pipelines is not None and isinstance(model, pipelines.Pipeline):
        model = model.model
    model = getattr(model, "_orig_mod", model)
    if not isinstance(model, modeling.PreTrainedModel) and hasattr(model, "get_base_model"):
        model = model.get_base_model()
    return model if isinstance(model, modeling.PreTrainedModel) else None
