"""A processor's work on one transformer: what the layers do in each forward pass."""

import math
import weakref
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import nn

from xattn_video.backends.table import resolve_backend
from xattn_video.errors import BackendUnavailableError
from xattn_video.ops.problem import Problem
from xattn_video.ops.scoring import check_precision
from xattn_video.policy.decision import Run, decide
from xattn_video.policy.settings import SparseSettings
from xattn_video.processors import joint_qkv
from xattn_video.processors.layer_slots import SLOT_NAME, ForwardPlan, Recorder
from xattn_video.processors.step_tracker import ForwardInputs, StepHook, StepTracker

NumSteps: TypeAlias = "int | Callable[[], int | None] | None"


class Session:
    """Follows the steps of one transformer, plans each forward pass and records what ran.

    Args:
        transformer: A HunyuanVideoTransformer3DModel.
        hook: What tells of its forward passes; registered on it.
        attentions: {layer name: attention module} of all joint-attention layers.
        own: The names of those that the processor serves.
        num_steps: Denoising steps of a generation, or what tells them.
    """

    def __init__(
        self,
        transformer: nn.Module,
        hook: StepHook,
        attentions: dict[str, nn.Module],
        own: list[str],
        num_steps: NumSteps,
    ) -> None:
        self.transformer = weakref.ref(transformer)
        self.hook = hook
        self.tracker = StepTracker()
        self._attentions = [attentions[name] for name in own]
        self.recorder = Recorder(own, self._attentions)
        self._num_steps = num_steps
        self._num_layers = len(attentions)
        self._positions = [number for number, name in enumerate(attentions) if name in own]

    def begin_forward(
        self, transformer: Any, inputs: ForwardInputs, settings: SparseSettings
    ) -> ForwardPlan:
        """Count the forward pass, fill the slots with its thresholds and open its record."""
        self.recorder.end_forward()
        if self.tracker.observe(inputs):
            self.recorder.start_generation()
        plan = self._plan(transformer, inputs, settings)
        self.recorder.begin_forward(self.tracker, inputs, plan)
        return plan

    def close(self) -> None:
        """Take the hook and the slots off the transformer."""
        self.recorder.end_forward()
        transformer = self.transformer()
        if transformer is not None:
            self.hook.remove_from(transformer)
        for attention, slot in zip(self._attentions, self.recorder.slots, strict=True):
            if getattr(attention, SLOT_NAME, None) is slot:
                delattr(attention, SLOT_NAME)

    def _plan(
        self, transformer: Any, inputs: ForwardInputs, settings: SparseSettings
    ) -> ForwardPlan:
        config = transformer.config
        step = self.tracker.step
        assert step is not None
        channels_last = (config.patch_size_t, config.patch_size, config.patch_size)
        num_video_tokens = math.prod(
            size // patch
            for size, patch in zip(inputs.latent_shape[1:], channels_last, strict=True)
        )
        key_lengths = [num_video_tokens + length for length in inputs.text_lengths]
        blocks = [
            -(-length // settings.block_size)
            for length in [num_video_tokens + inputs.text_tokens, *key_lengths]
        ]
        device = _layer_device(transformer, inputs.device)
        run = Run(
            self._num_layers,
            config.num_attention_heads,
            num_video_tokens,
            device.type,
            self._num_steps() if callable(self._num_steps) else self._num_steps,
            inputs.needs_grad,
        )
        decision = decide(settings, step, run)
        reason = decision.reason
        taus = decision.thresholds
        few_tokens = num_video_tokens < settings.min_tokens_on(device.type)
        backend = None
        if not (few_tokens or inputs.needs_grad or settings.schedule.is_dense):
            # In a dense step too: what cannot run is refused before the warm-up, not after it.
            backend = self._resolve(settings, inputs, device, config.attention_head_dim)
        if reason is None:
            self._fill_thresholds(settings, taus, device)
        lengths = torch.tensor(key_lengths)
        return ForwardPlan(
            sparse=reason is None,
            reason=reason,
            needs_grad=inputs.needs_grad,
            backend=backend if reason is None else None,
            threshold=taus[0][0] if settings.schedule.is_uniform else None,
            fused_on=device.type if joint_qkv.kernel_runs_on(device) else None,
            key_lengths=lengths,
            device_key_lengths=lengths.to(device, torch.int32, non_blocking=True),
            valid_blocks=blocks[0] * sum(blocks[1:]) * config.num_attention_heads,
        )

    def _resolve(
        self, settings: SparseSettings, inputs: ForwardInputs, device: torch.device, head_dim: int
    ) -> str:
        """The backend's name, outside of compiled code, before any layer has run."""
        dtype = inputs.dtype
        if torch.is_autocast_enabled(device.type):
            dtype = torch.get_autocast_dtype(device.type)
        problem = Problem(
            device=device,
            dtype=dtype,
            head_dim=head_dim,
            block_size=settings.block_size,
            ragged=len(set(inputs.text_lengths)) > 1,
        )
        try:
            check_precision(settings.scoring_precision, problem, settings.stride)
            return resolve_backend(settings.backend, problem)
        except (BackendUnavailableError, ValueError):
            self.recorder.num_refused += 1
            raise

    def _fill_thresholds(
        self, settings: SparseSettings, taus: tuple[tuple[float, ...], ...], device: torch.device
    ) -> None:
        """Give every layer its tau: a scalar, or `[H, 1]` where heads differ."""
        if settings.schedule.is_uniform:
            # A tensor, because torch.compile would compile anew for every other float.
            tau = torch.full((), taus[0][0], device=device)
            thresholds = [tau] * len(self.recorder.slots)
        else:
            own = [taus[position] for position in self._positions]
            thresholds = list(torch.tensor(own).unsqueeze(-1).to(device, non_blocking=True))
        for slot, threshold in zip(self.recorder.slots, thresholds, strict=True):
            slot.threshold = threshold


def _layer_device(transformer: nn.Module, input_device: torch.device) -> torch.device:
    """Where the layers compute: accelerate's offloading moves the inputs there later."""
    for module in transformer.modules():
        device = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
        if device is not None:
            return torch.device(device)
    return input_device
