"""XAttention as a Diffusers attention processor."""

import copy
import inspect
from typing import Any, ClassVar

import torch
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from torch import Tensor, nn

from xattn_video.errors import UnboundProcessorError
from xattn_video.policy.presets import preset_settings
from xattn_video.policy.report import SparsityReport
from xattn_video.policy.schedule import ThresholdLike
from xattn_video.policy.settings import SparseSettings
from xattn_video.policy.steps import ForwardInputs
from xattn_video.processors.binding import (
    ForwardHook,
    TransformerBound,
    family_of,
    install,
    unwrapped,
)
from xattn_video.processors.context_parallel import offer_plan, withdraw_plan
from xattn_video.processors.engine import HOW_TO_BIND, sparse_attention, unbound_error
from xattn_video.processors.pipeline_steps import PipelineSteps
from xattn_video.processors.recorder import SLOT_NAME, LayerSlot, Observer, SparseOperator
from xattn_video.processors.session import NumSteps, Session


class XAttnProcessor(TransformerBound):
    """Joint text-video attention: dense during the warm-up, then block-sparse.

    Set one instance on a transformer: ``pipe.transformer.set_attn_processor(XAttnProcessor())``.
    The processor reads the denoising step from the pipeline's scheduler if it knows the pipeline,
    else from the transformer's ``timestep``. One processor serves one transformer; a deep copy is
    independent, and follows the copied pipeline if that is copied too. The token refiner runs as
    usual. `xattn_video.processors.binding` explains how the processor learns its transformer.

    Args:
        threshold: Share tau of each row's estimated mass to keep, in (0, 1], by default 0.95; or
            a schedule of tau; or all arguments as one `SparseSettings`.
        options: The other fields of `SparseSettings`, by name: ``stride``, ``block_size``,
            ``warmup_steps``, ``cooldown_steps``, ``min_tokens``, ``backend``,
            ``scoring_precision``, ``density``, ``token_order``, ``compensation``, ``mask_every``,
            ``refresh_every``, ``residual``; see there. ``cooldown_steps`` needs the number of
            steps: from the pipeline, with `enable_xattention(pipe, ...)`, or from
            ``bind(transformer, num_steps=...)``.

    Attributes:
        settings: The `SparseSettings` in use.
        observers: Functions that are called after the attention of every layer; see
            `AttendedLayer`.
        operator: The function that computes a sparse layer; XAttention by default.

    The first forward pass raises if a named backend cannot run, if 8-bit scoring was requested
    and is not available, or if ``cooldown_steps`` has no number of steps.

    Raises:
        ValueError, TypeError: An argument is out of range or of a wrong type.
    """

    # Diffusers' set_attention_backend sets this.
    _attention_backend = None

    _refiner_processor: ClassVar[AttnProcessor2_0] = AttnProcessor2_0()

    __signature__ = inspect.signature(SparseSettings)

    def __init__(
        self, threshold: "ThresholdLike | SparseSettings | None" = None, **options: Any
    ) -> None:
        self.settings = SparseSettings.of(threshold, **options)
        self.observers: list[Observer] = []
        self.operator: SparseOperator = sparse_attention
        self._session: Session | None = None
        # What the first binding of a copy knows.
        self._copied_pipeline: PipelineSteps | None = None

    @classmethod
    def from_preset(cls, preset: str, **options: Any) -> "XAttnProcessor":
        """A processor with named settings: ``"quality"``, ``"balanced"`` or ``"fast"``.

        Args:
            preset: Name of the preset, which sets density, token order, compensation and
                refreshes; see docs/fewer-blocks.md.
            options: The other fields of `SparseSettings`, by name.

        Raises:
            ValueError, TypeError: There is no such preset, it contradicts an option, or a value
                is out of range.
        """
        return cls(preset_settings(preset, **options))

    def __repr__(self) -> str:
        given = repr(self.settings).removeprefix(type(self.settings).__name__)
        return f"{type(self).__name__}{given}"

    def __setattr__(self, name: str, value: Any) -> None:
        if name in SparseSettings.__dataclass_fields__:
            raise AttributeError(
                f"an XAttnProcessor has no attribute {name!r}; assign other settings as a whole: "
                f"processor.settings = dataclasses.replace(processor.settings, {name}=...)."
            )
        if name == "settings" and not isinstance(value, SparseSettings):
            raise TypeError(
                f"settings must be a SparseSettings, got {value!r}; use SparseSettings({value!r}) "
                "or dataclasses.replace(processor.settings, ...)."
            )
        super().__setattr__(name, value)

    def __getstate__(self) -> dict[str, Any]:
        # A copy serves no transformer yet. If the transformer was copied too, a hook binds it.
        return self.__dict__ | {"observers": [], "_session": None, "_copied_pipeline": None}

    def __deepcopy__(self, memo: dict[int, Any]) -> "XAttnProcessor":
        twin = memo[id(self)] = type(self).__new__(type(self))
        twin.__dict__.update(copy.deepcopy(self.__getstate__(), memo))
        known = self._copied_pipeline if self._session is None else self._session.pipeline
        twin._copied_pipeline = None if known is None else known.of_copy(memo)
        return twin

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        if encoder_hidden_states is None:
            # This is the token refiner; set_attn_processor replaces its processor too.
            refined: Tensor = self._refiner_processor(attn, hidden_states, None, attention_mask)
            return refined
        slot: LayerSlot | None = getattr(attn, SLOT_NAME, None)
        if slot is None or slot.attention is None:
            raise unbound_error()
        return slot.attention(
            attn, slot, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb
        )

    @property
    def step_index(self) -> int | None:
        """The denoising step of the latest forward pass; None before the first."""
        return None if self._session is None else self._session.tracker.step

    @property
    def layer_names(self) -> tuple[str, ...]:
        """The layers that the processor serves; empty before it is bound."""
        return () if self._session is None else self._session.recorder.layer_names

    def report(self) -> SparsityReport:
        """What ran in the latest generation, up to now; waits for the device.

        Raises:
            UnboundProcessorError: The processor has not served a transformer.
        """
        if self._session is None:
            raise UnboundProcessorError(
                f"this XAttnProcessor has nothing to report: {HOW_TO_BIND}"
            )
        return self._session.recorder.report()

    def reset(self) -> None:
        """Start a new generation with the next forward pass.

        This is needed only if the processor does not know the pipeline and an interrupted
        generation is followed by one that starts at a lower timestep, or if a run stops at its
        first step and the next differs only in the prompt: without `reset`, the next report lists
        the earlier pass too.
        """
        if self._session is not None:
            self._session.reset()

    def bind(
        self, transformer: Any, num_steps: NumSteps = None, *, pipeline: Any = None
    ) -> "XAttnProcessor":
        """Start serving a transformer whose layers use this processor.

        `set_attn_processor` calls this, and so does a forward pass after other layers got or lost
        the processor; the report then begins anew. Without ``num_steps`` and ``pipeline``, those
        that an earlier call for this transformer gave stay.

        Args:
            transformer: A transformer of a supported family.
            num_steps: Denoising steps of a generation, or a function that returns them; needed
                for ``cooldown_steps``.
            pipeline: The Diffusers pipeline that runs the transformer. The step is then read from
                its scheduler, and so is the number of steps unless ``num_steps`` is given.

        Raises:
            UnsupportedModelError: The model is not supported.
            ValueError: The model does not use this processor, the processor serves another model,
                or its schedule names a layer or a head that the model lacks.
        """
        transformer = unwrapped(transformer)
        self.check_binding(transformer)
        if not self.serves(transformer):
            raise ValueError(
                "no layer of this transformer uses this XAttnProcessor; "
                "call transformer.set_attn_processor(processor) instead of bind."
            )
        ForwardHook.install(self, transformer)
        family = family_of(transformer)
        before, tracker = self._session, None
        steps = self._copied_pipeline if before is None else None
        if pipeline is not None:
            steps = PipelineSteps(pipeline)
        if before is not None and before.is_open_on(transformer) and not (num_steps or steps):
            if before.is_current(transformer):
                return self
            num_steps, steps, tracker = before.num_steps, before.pipeline, before.tracker
            before.close()
        self._session = Session(
            transformer, family, lambda attn: attn.processor is self, num_steps, steps, tracker
        )
        offer_plan(transformer, self._session.family)
        return self

    def check_binding(self, transformer: Any) -> None:
        """Raise UnsupportedModelError or ValueError if it cannot serve the transformer."""
        transformer = unwrapped(transformer)
        num_layers = len(family_of(transformer).attentions(transformer))
        self.settings.schedule.per_head(0, num_layers, transformer.config.num_attention_heads)
        bound = None if self._session is None else self._session.transformer()
        if bound is not None and bound is not transformer and self.serves(bound):
            raise ValueError(
                "this XAttnProcessor is bound to another transformer; use a separate one for "
                "each, such as copy.deepcopy(processor)."
            )

    def unbind(self, transformer: Any) -> None:
        """Stop serving the transformer; the report of its latest generation stays."""
        ForwardHook.remove(self, transformer)
        if self._session is not None and self._session.transformer() is transformer:
            self._session.close()
            withdraw_plan(transformer, self._session.family)

    def serves(self, transformer: nn.Module) -> bool:
        """Whether a layer of the transformer uses this processor."""
        return any(getattr(module, "processor", None) is self for module in transformer.modules())

    def begin_forward(
        self, transformer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """Decide what the layers do in a forward pass; a hook calls this before the pass."""
        if torch.compiler.is_exporting():
            raise NotImplementedError(
                "torch.export is not supported: which steps are sparse is decided while the "
                "pipeline runs. Use torch.compile, or export with Diffusers' own processor."
            )
        if self._session is None or not self._session.is_current(transformer):
            # The transformer is a copy, and so is this processor; or another layer has it now.
            self.bind(transformer)
        session = self._session
        assert session is not None
        given = dict(zip(session.family.forward_arguments, args, strict=False)) | kwargs
        inputs: ForwardInputs = session.family.read_forward(transformer, given)
        session.begin_forward(
            inputs,
            self.settings,
            dense_backend=getattr(self._attention_backend, "value", self._attention_backend),
            operator=self.operator,
            observers=tuple(self.observers),
        )

    def end_forward(self, transformer: nn.Module) -> None:
        """Record what the layers did; a hook calls this after the pass, even a failed one."""
        if self._session is not None:
            self._session.end_forward()


install()
