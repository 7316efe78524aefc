"""Attention under one name of transformers' attention interface, and its mask function."""

import warnings
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from xattn_video.backends.table import resolve_backend
from xattn_video.errors import UnsupportedModelError
from xattn_video.language.causal_dense import dense_causal_attention
from xattn_video.language.masks import TOO_FEW, CausalBounds, MaskRequest, decide_prefill
from xattn_video.language.prefill_report import SPARSE, PrefillRecorder
from xattn_video.language.prefill_settings import PrefillSettings
from xattn_video.ops.attention import compute_attention
from xattn_video.ops.blocks import count_causal_blocks
from xattn_video.ops.problem import AttentionInputs
from xattn_video.ops.scoring import ScoringInputs
from xattn_video.ops.selection import compute_selection

# Arguments of models that change the attention weights, with descriptions for messages.
_NOT_COMPUTED = {
    "softcap": "soft-capped scores, as in Gemma 2",
    "s_aux": "attention sinks, as in gpt-oss",
    "sinks": "attention sinks, as in gpt-oss",
    "position_bias": "a bias for positions",
    "indices": "the model's own selection of tokens, as in DeepSeek V3.2",
    "block_indices": "the model's own selection of blocks, as in MiniMax M3",
}
_USE_ANOTHER = 'use attn_implementation="eager" or another that computes it'
_REASON = "_xattn_reason"
_PADDING = "padding alone"


@dataclass(frozen=True, slots=True)
class _LayerPlan:
    """What a layer does in a sparse forward pass: tau `[H, 1]`, or why it runs dense."""

    threshold: Tensor | None
    reason: str | None


class PrefillAttention:
    """The functions registered under one name: `make_mask` per forward pass, `attend` per layer.

    Attributes:
        name: The registered name.
        settings: When and how prefill is sparse.
        config: The text configuration of the name's only model; None if any model may use it.
        recorder: Counts what runs.
    """

    def __init__(self, name: str, settings: PrefillSettings, config: Any = None) -> None:
        self.name = name
        self.settings = settings
        self.config = config
        self.recorder = PrefillRecorder()
        # By layer, heads, layers of the model and device; models of a name may differ in all.
        self._plans: dict[tuple[int | None, int, int | None, torch.device], _LayerPlan] = {}
        # Why layers without a mask run dense, by whether a window limits them.
        self._unmasked: dict[bool, str] = {}
        self._warned = False

    def make_mask(self, **arguments: Any) -> Tensor | None:
        """The bounds of plain causal attention, see `CausalBounds.to_tensor`, or SDPA's mask.

        Raises:
            UnsupportedModelError: The model takes its mask from here, but not its attention.
        """
        if torch.compiler.is_compiling():
            self.recorder.compiled = True
            return sdpa_mask(**arguments)
        self._refuse_eager_code(type(arguments["config"]))
        request = MaskRequest.of(arguments)
        decision = decide_prefill(
            request,
            block_size=self.settings.sparse.block_size,
            min_tokens=self.settings.min_tokens_on(torch.device(request.device).type),
        )
        if isinstance(decision, CausalBounds):
            config = arguments["config"].get_text_config(decoder=True)
            self._count_items(decision, request, self.settings.dense_reason(config) or SPARSE)
            return decision.to_tensor()
        self.recorder.count_forward(decision, request.batch_size * request.q_length)
        if decision == "gradients":
            self._warn_of_gradients()
        mask = sdpa_mask(**arguments)
        if mask is None:
            self._unmasked[request.local_size is not None] = decision
        else:
            setattr(mask, _REASON, decision)
        return mask

    def attend(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        **arguments: Any,
    ) -> tuple[Tensor, None]:
        """Attention of one layer.

        Args:
            module: The layer's attention module.
            query: `[B, H, Sq, D]`.
            key, value: `[B, Hkv, Sk, D]`; Hkv divides H.
            attention_mask: What `make_mask` made, or the user's own mask.
            arguments: The other arguments that transformers passes, such as ``scaling``.

        Returns:
            `[B, Sq, H, D]`, and None instead of attention weights.

        Raises:
            ValueError: This kind of attention is not supported.
            BackendUnavailableError: The backend cannot run the layer.
        """
        self._refuse(module, key, value, arguments)
        bounds = CausalBounds.of(attention_mask)
        if bounds is not None:
            whole = query.shape[2] == bounds.stop == key.shape[2] and not bounds.padded
            if not whole or _is_causal(module, arguments):
                scale = arguments.get("scaling")
                out = self._attend_within(module, query, key, value, bounds, scale)
                return out.transpose(1, 2), None
            # With SDPA, transformers would pass no mask either.
            attention_mask = None
        if torch.compiler.is_compiling():
            self.recorder.compiled = True
        else:
            reason = self._dense_reason(module, query, attention_mask, arguments)
            self.recorder.count_dense(_number(module), reason)
        attended: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, **arguments
        )
        return attended

    def _count_items(self, bounds: CausalBounds, request: MaskRequest, planned: str) -> None:
        """Count a forward pass by what its items do; those with enough keys do the planned."""
        rows = bounds.rows(request.q_length)
        items = Counter(
            planned if sparse else TOO_FEW
            for sparse, own in zip(bounds.sparse, rows, strict=True)
            if own.start < own.stop
        ) or Counter({_PADDING: len(rows)})
        for decision, number in items.items():
            self.recorder.count_forward(decision, number * request.q_length)

    def _refuse(
        self, module: nn.Module, key: Tensor, value: Tensor, arguments: dict[str, Any]
    ) -> None:
        """Raise ValueError if attention is more than a softmax of scaled products."""
        found = None
        for name, what in _NOT_COMPUTED.items():
            if arguments.get(name) is not None:
                found = what
        if arguments.get("dropout"):
            found = "dropout; call model.eval() first"
        sizes = key.shape[-1], value.shape[-1]
        if sizes[0] != sizes[1]:
            found = (
                f"values of another size ({sizes[1]}) than keys ({sizes[0]}), as in DeepSeek's "
                "latent attention"
            )
        if found is not None:
            self.recorder.num_refused += 1
            raise ValueError(
                f"{self.name} does not compute {found} ({type(module).__name__}); {_USE_ANOTHER}."
            )

    def _refuse_eager_code(self, config: type) -> None:
        """Raise UnsupportedModelError for a model that would read the mask as one of another kind.

        transformers lets a model of any class use a registered name.
        """
        model = AutoModelForCausalLM._model_mapping.get(config, None)
        if model and not (model._supports_sdpa or model._supports_attention_backend):
            self.recorder.num_refused += 1
            raise UnsupportedModelError(
                f"{model.__name__} does not use transformers' attention interface, so {self.name} "
                'cannot replace its attention; use attn_implementation="eager".'
            )

    def _dense_reason(
        self, module: nn.Module, query: Tensor, mask: Tensor | None, arguments: dict[str, Any]
    ) -> str:
        """Why a layer without bounds runs dense."""
        if query.shape[2] == 1:
            return "decode"
        if not _is_causal(module, arguments):
            return "not causal"
        if mask is not None:
            return getattr(mask, _REASON, "other mask")
        return self._unmasked.get(_has_window(module), "other mask")

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _attend_within(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        bounds: CausalBounds,
        scaling: float | None,
    ) -> Tensor:
        """Attention within bounds, `[B, H, Sq, D]`; rows of padding are 0."""
        scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
        key, value = key[:, :, : bounds.stop], value[:, :, : bounds.stop]
        plan = self._plan(module, query) if any(bounds.sparse) else _LayerPlan(None, TOO_FEW)
        layer = _LayerRun(self, _number(module), plan, scale)
        if not bounds.padded:
            out = layer.attend(query, key, value, bounds.sparse[0])
        else:
            B, H, Sq, _ = query.shape
            out = query.new_zeros(B, Sq, H, value.shape[3]).transpose(1, 2)
            for number, rows in enumerate(bounds.rows(Sq)):
                if rows.start < rows.stop:
                    item = slice(number, number + 1)
                    keys = slice(bounds.first[number], bounds.last[number])
                    out[item, :, rows] = layer.attend(
                        query[item, :, rows],
                        key[item, :, keys],
                        value[item, :, keys],
                        bounds.sparse[number],
                    )
        layer.record()
        return out

    def _plan(self, module: nn.Module, query: Tensor) -> _LayerPlan:
        """What a layer does; the same for all forward passes."""
        layer, heads = _number(module), query.shape[1]
        layers = getattr(getattr(module, "config", None), "num_hidden_layers", None)
        place = layer, heads, layers, query.device
        if place not in self._plans:
            if layers is not None:
                self.settings.check_model(layers, heads)
            taus = self.settings.thresholds(layer, heads)
            reason = self.settings.layer_reason(layer, heads)
            threshold = torch.tensor(taus, dtype=torch.float32)[:, None].to(query.device)
            self._plans[place] = _LayerPlan(threshold, reason)
        return self._plans[place]

    def _warn_of_gradients(self) -> None:
        if not self._warned:
            self._warned = True
            warnings.warn(
                f"{self.name} runs dense because gradients are enabled; call the model under "
                "torch.no_grad() or torch.inference_mode().",
                stacklevel=2,
            )


class _LayerRun:
    """One layer in one forward pass; items with padding are computed one by one."""

    def __init__(
        self, attention: PrefillAttention, layer: int | None, plan: _LayerPlan, scale: float
    ) -> None:
        self._attention = attention
        self._layer = layer
        self._plan = plan
        self._scale = scale
        self._kept: Tensor | None = None
        self._valid = 0
        self._backend = ""
        self._reasons: set[str] = set()

    def attend(self, query: Tensor, key: Tensor, value: Tensor, enough: bool) -> Tensor:
        """Causal attention, `[B, H, Sq, D]`; dense unless there are enough keys."""
        reason = self._plan.reason if enough else TOO_FEW
        if reason is not None:
            self._reasons.add(reason)
            return dense_causal_attention(query, key, value, self._scale)
        sparse, recorder = self._attention.settings.sparse, self._attention.recorder
        scoring = ScoringInputs(
            query,
            key,
            sparse.block_size,
            sparse.stride,
            True,
            None,
            self._scale,
            sparse.scoring_precision,
        )
        assert self._plan.threshold is not None
        try:
            blocks = compute_selection(
                scoring, self._plan.threshold, by_count=sparse.density is not None
            )
            inputs = AttentionInputs(
                query, key, value, blocks, sparse.block_size, True, None, self._scale
            )
            self._backend = resolve_backend(sparse.backend, inputs.problem)
            out, _ = compute_attention(inputs, self._backend)
        except (ValueError, RuntimeError):
            recorder.num_refused += 1
            raise
        kept = blocks.counts.sum()
        self._kept = kept if self._kept is None else self._kept + kept
        B, H, Sq, _ = query.shape
        self._valid += B * H * count_causal_blocks(Sq, key.shape[2], sparse.block_size)
        return out

    def record(self) -> None:
        """Count what the layer did."""
        recorder = self._attention.recorder
        if self._kept is not None:
            recorder.count_sparse(self._layer, self._kept, self._valid, self._backend)
        elif not self._reasons:
            # All rows of all items were padding.
            self._reasons.add(_PADDING)
        for reason in sorted(self._reasons):
            recorder.count_dense(self._layer, reason)


def _has_window(module: nn.Module) -> bool:
    """Whether a layer sees a limited number of tokens, by a sliding window or in chunks."""
    config, number = getattr(module, "config", None), _number(module)
    kinds = getattr(config, "layer_types", None)
    if kinds is not None and number is not None:
        return bool(kinds[number] != "full_attention")
    # All layers are of one kind.
    return any(getattr(of, "sliding_window", None) is not None for of in (module, config))


def _is_causal(module: nn.Module, arguments: dict[str, Any]) -> bool:
    """Whether a layer without a mask is causal, decided as transformers' SDPA function does."""
    causal = arguments.get("is_causal")
    return bool(getattr(module, "is_causal", True) if causal is None else causal)


def _number(module: nn.Module) -> int | None:
    """The number of a layer, if it has one; layers that are run several times may have -1."""
    number = getattr(module, "layer_idx", None)
    return number if isinstance(number, int) and number >= 0 else None
