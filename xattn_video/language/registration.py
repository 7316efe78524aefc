"""Registers sparse prefill under a name in transformers, and sets it on a model."""

import re
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, NoReturn

from xattn_video.errors import MissingPackageError, UnsupportedModelError

try:
    from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
    from transformers import __version__ as _version
except ImportError:
    raise MissingPackageError(
        "sparse prefill needs transformers, which is not installed; pip install transformers."
    ) from None
from xattn_video.language.prefill_attention import PrefillAttention
from xattn_video.language.prefill_report import PrefillReport
from xattn_video.language.prefill_settings import PrefillSettings
from xattn_video.policy.schedule import ThresholdLike
from xattn_video.policy.settings import SparseSettings

# The names that `enable_prefill` chooses.
_GENERATED = re.compile(r"xattention-\d+")
# transformers treats names that contain one of these specially.
_OTHERS = ("eager", "sdpa", "flash", "flex", "paged", "/", "|")


# Older versions always build the masks of static caches, so bounds could not replace them.
_OLDEST = (5, 14)


class LanguageHandle(AbstractContextManager["LanguageHandle"]):
    """Sparse prefill under one name, until `disable` or the end of a ``with`` block.

    Attributes:
        name: The name for transformers' ``attn_implementation``.
    """

    def __init__(self, attention: PrefillAttention, model: PreTrainedModel | None = None) -> None:
        check_transformers()
        self.name = attention.name
        self._attention = attention
        self._model = model
        self._previous: str | None = None
        self._disabled = False
        _register(attention)
        if model is not None:
            self._previous = _text_config(model)._attn_implementation
            self._give_to(model)

    def report(self) -> PrefillReport:
        """What ran under this name; also works after `disable`."""
        return self._attention.recorder.report()

    def disable(self) -> None:
        """Restore the model's attention and remove the name. A second call does nothing.

        If the previous name was removed meanwhile, the model gets transformers' default.
        No model may still use a name from `register_attention`.
        """
        self._disabled = True
        model, self._model = self._model, None
        if model is not None and _text_config(model)._attn_implementation == self.name:
            model.set_attn_implementation(_for_text(model, _still_registered(self._previous)))
        _unregister(self._attention)

    def __enter__(self) -> "LanguageHandle":
        if self._disabled:
            raise RuntimeError(f"{self.name} was disabled; enable or register attention again.")
        return self

    def __exit__(self, *exception: object) -> None:
        self.disable()

    def _give_to(self, model: PreTrainedModel) -> None:
        try:
            model.set_attn_implementation(_for_text(model, self.name))
        except BaseException:
            _unregister(self._attention)
            raise
        if _text_config(model)._attn_implementation != self.name:
            _unregister(self._attention)
            raise UnsupportedModelError(
                f"{type(model).__name__} does not use transformers' attention interface, so "
                "its attention cannot be replaced."
            )


def register_attention(
    threshold: "ThresholdLike | SparseSettings | None" = None,
    *,
    name: str = "xattention",
    dense_layers: int = 0,
    **options: Any,
) -> LanguageHandle:
    """Register sparse prefill in transformers, for ``attn_implementation="xattention"``.

    Long causal prefill then runs sparse in every model that uses the name; everything else runs
    as with ``"sdpa"``. Registering a name again replaces its settings.

    Args:
        threshold: Share tau of each row's estimated mass to keep, in (0, 1]; 0.9 if neither it nor
            ``density`` is given. Or a `ThresholdSchedule` by layer and head, or a whole
            `SparseSettings`.
        name: The name.
        dense_layers: Number of first layers that stay dense.
        options: ``stride``, ``block_size``, ``min_tokens`` (8192 by default, 16384 on CUDA),
            ``backend``, ``scoring_precision`` and ``density``, as in `XAttnProcessor`.

    Returns:
        A handle with ``report()``, and ``disable()``, which removes the name.

    Raises:
        ValueError, TypeError: A setting is out of range or of a wrong type, or the name is no
            string or reserved.
        MissingPackageError: transformers is too old.
    """
    if not isinstance(name, str):
        raise TypeError(f'name must be a string, got {name!r}; use "xattention", for example.')
    taken = [other for other in _OTHERS if other in name]
    if not name or taken:
        raise ValueError(
            f"transformers reserves {taken[0] if taken else name!r} in a name, got "
            f'{name!r}; use another name, such as "xattention".'
        )
    if _GENERATED.fullmatch(name):
        raise ValueError(
            f"enable_xattention gives models names such as {name!r}; use another name, such as "
            '"xattention".'
        )
    return LanguageHandle(
        PrefillAttention(name, PrefillSettings.of(threshold, dense_layers, **options))
    )


def enable_prefill(
    model: PreTrainedModel,
    threshold: "ThresholdLike | SparseSettings | None" = None,
    *,
    dense_layers: int = 0,
    **options: Any,
) -> LanguageHandle:
    """Let a model's long prefill run sparse; in a vision-language model, that of the text model.

    Args:
        model: A transformers model with causal attention.
        threshold, dense_layers, options: As in `register_attention`.

    Returns:
        A handle with ``report()`` and ``disable()``; also a context manager.

    Raises:
        UnsupportedModelError: The model has an encoder or no attention, or its attention cannot
            be replaced. A decoder whose layers are not causal runs dense.
        RuntimeError: XAttention is already enabled on the model.
        ValueError, TypeError: A setting is out of range or of a wrong type, or names a layer or a
            head that the model lacks.
        MissingPackageError: transformers is too old.
    """
    config = _text_config(model)
    present = AttentionInterface().get(config._attn_implementation)
    of = getattr(present, "__self__", None)
    # A copy of an enabled model has its name, but a configuration of its own.
    if isinstance(of, PrefillAttention) and of.config is config:
        raise RuntimeError(
            "XAttention is already enabled on this model; call disable() on its handle first."
        )
    settings = PrefillSettings.of(threshold, dense_layers, **options)
    settings.check_config(config, type(model).__name__)
    _check_text_models(model, config)
    return LanguageHandle(PrefillAttention(_new_name(), settings, config), model)


def _new_name() -> str:
    """A new name; the registry is global, so each model with its own settings needs one."""
    # Removed names stay in the registry, so none is given twice.
    used = sum(_GENERATED.fullmatch(name) is not None for name in AttentionInterface())
    return f"xattention-{used + 1}"


def check_transformers() -> None:
    """Raise MissingPackageError if transformers is too old."""
    if tuple(map(int, _version.split(".")[:2])) < _OLDEST:
        oldest = ".".join(map(str, _OLDEST))
        raise MissingPackageError(
            f"sparse prefill needs transformers {oldest} or newer, got {_version}; "
            "pip install -U transformers."
        )


def _register(attention: PrefillAttention) -> None:
    AttentionInterface.register(attention.name, attention.attend)
    AttentionMaskInterface.register(attention.name, attention.make_mask)


def _unregister(attention: PrefillAttention) -> None:
    """Remove the name unless it was registered again; transformers has no function for that.

    The name of one model stays, and refuses to run: copies of the model may still use it.
    """
    if AttentionInterface._global_mapping.get(attention.name) != attention.attend:
        return
    if attention.config is None:
        del AttentionInterface._global_mapping[attention.name]
        del AttentionMaskInterface._global_mapping[attention.name]
    else:
        AttentionInterface.register(attention.name, partial(_refuse, attention.name))
        AttentionMaskInterface.register(attention.name, partial(_refuse, attention.name))


def _refuse(name: str, *arguments: Any, **options: Any) -> NoReturn:
    """The functions of a name that was removed."""
    raise RuntimeError(
        f"{name} was disabled, but this model, a copy of the one that it was enabled on, still "
        'uses it; call set_attn_implementation("sdpa") or enable_xattention on the copy.'
    )


def _still_registered(name: str | None) -> str | None:
    """The name if a model can go back to it; None, transformers' own choice, otherwise."""
    if name is None or _GENERATED.fullmatch(name):
        return None
    return name if name == "eager" or name in AttentionInterface() else None


def _text_config(model: PreTrainedModel) -> Any:
    """The configuration of a model's causal language model."""
    if model.config.is_encoder_decoder:
        raise UnsupportedModelError(
            f"{type(model).__name__} has an encoder and a decoder; use a decoder-only "
            "language model, with or without a vision tower."
        )
    return model.config.get_text_config(decoder=True)


def _check_text_models(model: PreTrainedModel, config: Any) -> None:
    """Raise UnsupportedModelError if the attention of a model's text has no SDPA form.

    Eager code that only takes its mask from the interface would read SDPA's as another kind.
    ``config`` is the text's.
    """
    for one in model.modules():
        if isinstance(one, PreTrainedModel) and one.config is config and not one._supports_sdpa:
            raise UnsupportedModelError(
                f"{type(one).__name__} cannot run with transformers' SDPA (its attention is eager "
                "code, or has sinks or soft-capped scores), so its attention cannot be replaced."
            )


def _for_text(model: PreTrainedModel, name: str | None) -> Any:
    """The argument of `set_attn_implementation` that leaves all other towers unchanged."""
    text = _text_config(model)
    keys = [key for key in model.config.sub_configs if getattr(model.config, key, None) is text]
    # An empty key is the model's own configuration.
    return {keys[0] if keys else "": name}
