"""The work of a processor on one transformer: decides what the layers do in each pass."""

import threading
import weakref
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import nn

from xattn_video.errors import BackendUnavailableError
from xattn_video.kernels.support import device_unsupported_reasons
from xattn_video.policy.decision import Decision, Run, decide
from xattn_video.policy.settings import SparseSettings
from xattn_video.policy.steps import ForwardInputs, StepTracker
from xattn_video.processors.context_parallel import exchange_of
from xattn_video.processors.families import Family
from xattn_video.processors.kept import KeptByPass, KeptStore
from xattn_video.processors.layout import TokenLayout
from xattn_video.processors.pipeline_steps import PipelineSteps
from xattn_video.processors.recorder import (
    SLOT_NAME,
    ForwardPass,
    Observer,
    Recorder,
    SparseOperator,
)

NumSteps: TypeAlias = "int | Callable[[], int | None] | None"


class Session:
    """Follows the steps of one transformer, decides each forward pass and records what ran.

    Args:
        transformer: A transformer of a supported family.
        family: Its family.
        serves: Tells whether an attention module uses the processor.
        num_steps: Denoising steps of a generation, or a function that returns them.
        pipeline: The steps of the pipeline that runs the transformer; None if it is not known.
        tracker: Counts the steps; anew if not given.
    """

    def __init__(
        self,
        transformer: nn.Module,
        family: Family,
        serves: Callable[[Any], bool],
        num_steps: NumSteps,
        pipeline: PipelineSteps | None,
        tracker: StepTracker | None = None,
    ) -> None:
        attentions = family.attentions(transformer)
        own = {name: attn for name, attn in attentions.items() if serves(attn)}
        self.transformer = weakref.ref(transformer)
        self.family = family
        self.tracker = StepTracker() if tracker is None else tracker
        self.recorder = Recorder(tuple(own), tuple(own.values()), family.attention)
        self._serves = serves
        self._attentions = tuple(own.values())
        self._kept = KeptStore()
        self._spent: KeptByPass | None = None
        self.num_steps = num_steps
        self.pipeline = pipeline
        # The thread whose forward pass is open.
        self._thread: int | None = None
        self._lock = threading.Lock()
        self._closed = False
        self._num_layers = len(attentions)
        self._positions = [number for number, name in enumerate(attentions) if name in own]

    def begin_forward(
        self,
        inputs: ForwardInputs,
        settings: SparseSettings,
        *,
        dense_backend: Any,
        operator: SparseOperator,
        observers: tuple[Observer, ...],
    ) -> None:
        """Count the forward pass, decide what every layer does and open its record.

        Raises:
            RuntimeError: The transformer is in a forward pass of another thread.
        """
        with self._lock:
            if self._thread not in (None, threading.get_ident()):
                raise RuntimeError(
                    "this transformer is in a forward pass of another thread, and its XAttention "
                    "follows one at a time; use a lock, or a copy of the pipeline for each thread "
                    "(processor.reset() ends a pass that was interrupted)."
                )
            self._thread = threading.get_ident()
        transformer: Any = self.transformer()
        pipeline, timestep = self.pipeline, inputs.timestep
        scheduler_step = None if pipeline is None else pipeline.current(timestep)
        if self.tracker.observe(inputs, scheduler_step):
            self.recorder.start_generation()
            self._kept.clear()
        step = self.tracker.step
        assert step is not None
        config = transformer.config
        num_steps = self.num_steps() if callable(self.num_steps) else self.num_steps
        if num_steps is None and pipeline is not None:
            num_steps = pipeline.count(timestep)
        device = _layer_device(transformer, inputs.device)
        layout = self.family.layout(config, inputs, device)
        run = Run(
            self._num_layers,
            config.num_attention_heads,
            layout.num_video_tokens,
            device.type,
            num_steps,
            inputs.needs_grad,
        )
        decision = decide(settings, step, run)
        exchange = exchange_of(transformer, self.family, layout, inputs.needs_grad)
        backend = None
        few_tokens = layout.num_video_tokens < settings.min_tokens_on(device.type)
        if not (few_tokens or inputs.needs_grad or settings.schedule.is_dense):
            # Resolved in dense steps too, so that a refusal comes before the warm-up.
            backend = self._resolve(settings, inputs, layout, config.attention_head_dim)
        lengths = None
        if layout.ragged:
            lengths = torch.tensor(layout.key_lengths, dtype=torch.int32)
            lengths = lengths.to(device, non_blocking=True)
        if decision.any_sparse_output and settings.token_order == "hilbert":
            layout = layout.along_hilbert_curve()
        forward = ForwardPass(
            settings,
            decision,
            layout,
            lengths,
            backend if decision.any_sparse_output else None,
            dense_backend,
            exchange,
            operator,
            observers,
            self._kept_of(inputs, settings, decision, layout),
        )
        self._fill_slots(decision, device)
        self.recorder.begin_forward(
            forward, step, self.tracker.forward_pass, inputs.timestep, config.num_attention_heads
        )

    def end_forward(self) -> None:
        """Close the record and free what no later step uses. A second call changes nothing.

        Nor does a call in a thread whose pass was refused.
        """
        if self._thread not in (None, threading.get_ident()):
            return
        self._thread = None
        self.recorder.end_forward()
        if self._spent is not None:
            self._kept.drop(self._spent)
            self._spent = None

    def is_open_on(self, transformer: nn.Module) -> bool:
        """Whether it follows the transformer, and was not closed."""
        return self.transformer() is transformer and not self._closed

    def is_current(self, transformer: nn.Module) -> bool:
        """Whether it is open on exactly the layers that use the processor now, by its slots."""
        attentions = self.family.attentions(transformer).values()
        own = tuple(filter(self._serves, attentions))
        return (
            self.is_open_on(transformer)
            and self._attentions == own
            # Another processor may have had the layers in between.
            and all(
                getattr(attention, SLOT_NAME, None) is slot
                for attention, slot in zip(own, self.recorder.slots, strict=True)
            )
        )

    def reset(self) -> None:
        """Forget the generation, but keep its report."""
        self._thread = None
        self.tracker.reset()
        self._kept.clear()

    def close(self) -> None:
        """Remove the slots from the transformer."""
        self._closed = True
        self.end_forward()
        self._kept.close()
        for attention, slot in zip(self._attentions, self.recorder.slots, strict=True):
            if getattr(attention, SLOT_NAME, None) is slot:
                delattr(attention, SLOT_NAME)

    def _kept_of(
        self,
        inputs: ForwardInputs,
        settings: SparseSettings,
        decision: Decision,
        layout: TokenLayout,
    ) -> KeptByPass | None:
        """What the layers of this pass kept, or will keep; None if nothing is kept."""
        if not (settings.keeps_between_steps and decision.any_sparse_output):
            return None
        identity = (
            settings,
            inputs.latent_shape,
            inputs.dtype,
            inputs.text_lengths,
            inputs.text_tokens,
            inputs.text_sample,
            inputs.lora_scale,
            _adapters(self.transformer()),
            layout.device,
        )
        kept = self._kept.of_pass(
            self.tracker.forward_pass, identity, settings, len(self.recorder.slots)
        )
        self._spent = kept if decision.last_sparse else None
        return kept

    def _resolve(
        self, settings: SparseSettings, inputs: ForwardInputs, layout: TokenLayout, head_dim: int
    ) -> str:
        """Choose the backend, outside compiled code and before any layer runs."""
        device, dtype = layout.device, inputs.dtype
        if torch.is_autocast_enabled(device.type):
            dtype = torch.get_autocast_dtype(device.type)
        try:
            return settings.backend_for(
                device, dtype, head_dim, causal=layout.causal, ragged=layout.ragged
            )
        except (BackendUnavailableError, ValueError):
            self.recorder.num_refused += 1
            raise

    def _fill_slots(self, decision: Decision, device: torch.device) -> None:
        """Tell every layer what it does, and its tau: a scalar, or `[H, 1]`."""
        taus = [decision.thresholds[position] for position in self._positions]
        if decision.threshold is not None:
            thresholds = [torch.full((), decision.threshold, device=device)] * len(taus)
        else:
            thresholds = list(torch.tensor(taus).unsqueeze(-1).to(device, non_blocking=True))
        fuses = kernel_runs_on(device)
        for slot, position, threshold in zip(
            self.recorder.slots, self._positions, thresholds, strict=True
        ):
            slot.reason = decision.layer_reason(position)
            slot.threshold = threshold if decision.computes_sparsely(position) else None
            slot.fuses = fuses


def _adapters(transformer: Any) -> tuple[Any, ...]:
    """Each layer's active and merged LoRA adapters, and their scales; empty without PEFT."""
    if not getattr(transformer, "peft_config", None):
        return ()
    layers = (module for module in transformer.modules() if hasattr(module, "merged_adapters"))
    return tuple(
        (
            *(layer.disable_adapters, *layer.active_adapters, *layer.merged_adapters),
            *getattr(layer, "scaling", {}).items(),
        )
        for layer in layers
    )


def kernel_runs_on(device: torch.device) -> bool:
    """Whether a kernel can prepare queries and keys there; called once for all layers."""
    return device.type == "cuda" and not device_unsupported_reasons(device)


def _layer_device(transformer: nn.Module, input_device: torch.device) -> torch.device:
    """The device that runs the layers; with accelerate's offloading the inputs arrive later."""
    for module in transformer.modules():
        device = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
        if device is not None:
            return torch.device(device)
    return input_device
