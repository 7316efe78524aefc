"""XAttention as an attention processor of Diffusers' HunyuanVideo transformer."""

import inspect
from typing import Any, ClassVar

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from torch import Tensor, nn

from xattn_video.errors import UnboundProcessorError
from xattn_video.policy.report import SparsityReport
from xattn_video.policy.schedule import ThresholdLike
from xattn_video.policy.settings import DEFAULT_THRESHOLD, SparseSettings
from xattn_video.processors.binding import TransformerBound, install, supported_transformer
from xattn_video.processors.joint_attention import dense_attention, sparse_attention
from xattn_video.processors.joint_qkv import can_fuse, join, prepare_eagerly, prepare_fused
from xattn_video.processors.layer_slots import (
    SLOT_NAME,
    ForwardPlan,
    LayerSlot,
    Recorder,
    joint_attentions,
)
from xattn_video.processors.session import NumSteps, Session
from xattn_video.processors.step_tracker import ForwardInputs, StepHook

_HOW_TO_BIND = (
    "set it with transformer.set_attn_processor(processor), or call processor.bind(transformer) "
    "after setting it layer by layer; supported is HunyuanVideoTransformer3DModel."
)


class XAttnProcessor(TransformerBound):
    """Joint text-video attention: dense while warming up, then block-sparse.

    Set one instance on a transformer, ``pipe.transformer.set_attn_processor(XAttnProcessor())``;
    it learns the denoising step from the transformer's own ``timestep``. One processor serves one
    transformer; a deep copy is independent. The token refiner is computed as ever. How setting it
    tells it the transformer: `xattn_video.processors.binding`.

    Args:
        threshold: Share tau of each row's estimated mass to keep, in (0, 1]; or a schedule of
            them; or all arguments as one `SparseSettings`.
        options: The other fields of `SparseSettings`, by name: ``stride``, ``block_size``,
            ``warmup_steps``, ``cooldown_steps``, ``min_tokens``, ``backend``,
            ``scoring_precision``. What each means stands there. ``cooldown_steps`` needs the
            number of steps: from the pipeline, with `enable_xattention(pipe, ...)`, or from
            ``bind(transformer, num_steps=...)``.

    The first forward pass raises where a backend that was asked for by name cannot run, 8 bits
    cannot be had, or ``cooldown_steps`` has no number of steps.

    Raises:
        ValueError, TypeError: An argument is out of range or of a wrong type.
    """

    # Diffusers' set_attention_backend and enable_parallelism set these.
    _attention_backend = None
    _parallel_config = None

    _refiner_processor: ClassVar[AttnProcessor2_0] = AttnProcessor2_0()

    __signature__ = inspect.signature(SparseSettings)

    def __init__(
        self, threshold: "ThresholdLike | SparseSettings" = DEFAULT_THRESHOLD, **options: Any
    ) -> None:
        self.settings = SparseSettings.of(threshold, **options)
        self._session: Session | None = None
        self._recorder: Recorder | None = None
        self._plan: ForwardPlan | None = None

    def __repr__(self) -> str:
        given = repr(self.settings).removeprefix(type(self.settings).__name__)
        return f"{type(self).__name__}{given}"

    def __getstate__(self) -> dict[str, Any]:
        # A copy serves no transformer yet; that of a copied transformer is bound by its hook.
        unbound = {"_session": None, "_recorder": None, "_plan": None, "_parallel_config": None}
        return {**self.__dict__, **unbound}

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        if encoder_hidden_states is None:
            # The token refiner, whose processor set_attn_processor replaces as well.
            refined: Tensor = self._refiner_processor(attn, hidden_states, None, attention_mask)
            return refined
        slot: LayerSlot | None = getattr(attn, SLOT_NAME, None)
        plan = self._plan
        if slot is None or plan is None:
            raise UnboundProcessorError(
                f"this XAttnProcessor knows no transformer and no step: {_HOW_TO_BIND}"
            )
        num_text_tokens = encoder_hidden_states.shape[1]

        if attn.add_q_proj is None:
            hidden_states = join(hidden_states, encoder_hidden_states)

        # 1. QKV projections
        query = attn.to_q(hidden_states)
        key = attn.to_k(hidden_states)
        value = attn.to_v(hidden_states)

        query = query.unflatten(2, (attn.heads, -1))
        key = key.unflatten(2, (attn.heads, -1))
        value = value.unflatten(2, (attn.heads, -1))

        # 2. to 4. QK normalization, rotary embedding of the video, QKV projections of the text
        heads = (query, key, value)
        if (
            query.device.type == plan.fused_on
            and image_rotary_emb is not None
            and can_fuse(attn, heads, encoder_hidden_states, image_rotary_emb)
        ):
            heads = prepare_fused(attn, heads, encoder_hidden_states, image_rotary_emb)
        else:
            heads = prepare_eagerly(attn, heads, encoder_hidden_states, image_rotary_emb)
        query, key, value = heads

        # 5. Attention
        hidden_states = self._attend(
            slot, plan, query, key, value, attention_mask, num_text_tokens
        )
        hidden_states = hidden_states.flatten(2, 3)
        hidden_states = hidden_states.to(query.dtype)

        # 6. Output projection
        hidden_states, encoder_hidden_states = (
            hidden_states[:, :-num_text_tokens],
            hidden_states[:, -num_text_tokens:],
        )

        if getattr(attn, "to_out", None) is not None:
            hidden_states = attn.to_out[0](hidden_states)
            hidden_states = attn.to_out[1](hidden_states)

        if getattr(attn, "to_add_out", None) is not None:
            encoder_hidden_states = attn.to_add_out(encoder_hidden_states)

        return hidden_states, encoder_hidden_states

    def _attend(
        self,
        slot: LayerSlot,
        plan: ForwardPlan,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        num_text_tokens: int,
    ) -> Tensor:
        """Attention as the plan of this forward pass says, `[B, S, H, D]`."""
        # A hook on a module may have brought in gradients that the plan knows nothing of.
        needs_grad = plan.needs_grad or (
            torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (query, key, value))
        )
        if needs_grad or self._parallel_config is not None:
            slot.record_dense()
            out: Tensor = dispatch_attention_fn(
                query,
                key,
                value,
                attn_mask=attention_mask,
                backend=self._attention_backend,
                parallel_config=self._parallel_config,
            )
            return out
        # Under autocast the normalised queries and keys are float32, the values are not.
        query, key = query.to(value.dtype), key.to(value.dtype)
        if not plan.sparse:
            slot.record_dense()
            return dense_attention(query, key, value, plan.key_lengths, self._attention_backend)
        assert slot.threshold is not None
        assert plan.backend is not None
        out, kept = sparse_attention(
            query,
            key,
            value,
            slot.threshold,
            plan.key_lengths,
            plan.device_key_lengths,
            num_text_tokens,
            stride=self.settings.stride,
            block_size=self.settings.block_size,
            backend=plan.backend,
            scoring_precision=self.settings.scoring_precision,
        )
        slot.record_sparse(kept)
        return out

    @property
    def step_index(self) -> int | None:
        """The denoising step of the latest forward pass; None before the first."""
        return None if self._session is None else self._session.tracker.step

    def report(self) -> SparsityReport:
        """What ran in the latest generation, up to now; waits for the device.

        Raises:
            UnboundProcessorError: The processor has not served a transformer.
        """
        if self._recorder is None:
            raise UnboundProcessorError(
                f"this XAttnProcessor has nothing to report: {_HOW_TO_BIND}"
            )
        return self._recorder.report()

    def reset(self) -> None:
        """Start a new generation with the next forward pass.

        Needed only where the timesteps cannot tell: after an interrupted generation, when the next
        one starts at a lower timestep than the last one that ran. After one that stopped at its
        first step it keeps that step out of the next report, where only the prompt is another.
        """
        if self._session is not None:
            self._session.tracker.reset()

    def bind(self, transformer: Any, num_steps: NumSteps = None) -> "XAttnProcessor":
        """Serve a transformer whose layers have this processor; `set_attn_processor` does it.

        Args:
            transformer: A HunyuanVideoTransformer3DModel.
            num_steps: Denoising steps of a generation, or what tells them; for cooldown_steps.

        Raises:
            UnsupportedModelError: The model is another one.
            ValueError: The model does not use this processor, or another one does.
        """
        transformer = supported_transformer(transformer)
        self.check_binding(transformer)
        if not self.serves(transformer):
            raise ValueError(
                "no layer of this transformer uses this XAttnProcessor; "
                "call transformer.set_attn_processor(processor) instead of bind."
            )
        attentions = joint_attentions(transformer)
        own = [name for name, attn in attentions.items() if attn.processor is self]
        hook = StepHook.of(self, transformer)
        self._session = Session(transformer, hook, attentions, own, num_steps)
        self._recorder = self._session.recorder
        self._plan = None
        parallel_config = getattr(transformer, "_parallel_config", None)
        if getattr(parallel_config, "context_parallel_config", None) is not None:
            self._parallel_config = parallel_config
        return self

    def check_binding(self, transformer: Any) -> None:
        """Raise where the processor cannot serve the transformer."""
        transformer = supported_transformer(transformer)
        num_layers = len(joint_attentions(transformer))
        self.settings.schedule.per_head(0, num_layers, transformer.config.num_attention_heads)
        bound = None if self._session is None else self._session.transformer()
        if bound is not None and bound is not transformer and self.serves(bound):
            raise ValueError(
                "this XAttnProcessor serves another transformer; give each its own, "
                "such as copy.deepcopy(processor)."
            )

    def unbind(self, transformer: Any) -> None:
        """Leave the transformer; the report of its latest generation stays."""
        if self._session is None or self._session.transformer() is not transformer:
            return
        self._session.close()
        self._session = None
        self._plan = None

    def serves(self, transformer: nn.Module) -> bool:
        """Whether a layer of the transformer uses this processor."""
        return any(getattr(module, "processor", None) is self for module in transformer.modules())

    def begin_forward(self, transformer: nn.Module, inputs: ForwardInputs) -> None:
        """Plan a forward pass; the hook calls this before the first layer runs."""
        if self._session is None:
            # The transformer is a copy, and so is this processor.
            self.bind(transformer)
        assert self._session is not None
        self._plan = self._session.begin_forward(transformer, inputs, self.settings)
        if self._plan.sparse and self._parallel_config is not None:
            raise NotImplementedError(
                "sparse steps do not run under context parallelism yet; use a threshold of 1, or "
                "run without transformer.enable_parallelism."
            )


install()
