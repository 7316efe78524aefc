"""What the hook before a forward pass tells the layers, and what they tell it."""

import collections
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from xattn_video.policy.report import ForwardRun, LayerRun, SparsityReport, State
from xattn_video.processors.step_tracker import ForwardInputs, StepTracker

SLOT_NAME = "_xattn_slot"

# Forward passes of one generation that are kept for the report; the oldest go first.
_MAX_FORWARDS = 4096


class LayerSlot:
    """One layer's threshold for this forward pass, and what the layer did with it.

    It hangs on the layer's attention module, so that compiled code finds it without knowing the
    layer's number, for which torch.compile would compile every layer anew.
    """

    def __init__(self) -> None:
        self.threshold: Tensor | None = None
        self.state: State = "skipped"
        self.kept: Tensor | None = None

    def __reduce__(self) -> tuple[type, tuple[()]]:
        # A copy's layer has run nothing yet.
        return type(self), ()

    def record_dense(self) -> None:
        """The layer ran dense."""
        self.state = "dense"

    def record_sparse(self, kept: Tensor) -> None:
        """The layer ran sparse and computed ``kept`` blocks, a scalar that stays on the device."""
        self.state = "sparse"
        self.kept = kept


@dataclass(frozen=True, slots=True)
class ForwardPlan:
    """What the layers are to do in one forward pass.

    Args:
        sparse: Whether they run sparse.
        reason: Why they do not.
        needs_grad: Whether something in the model needs gradients, in a layer after this one too.
        backend: What computes sparse attention; None where the layers run dense.
        threshold: Tau where it is one number for all layers and heads.
        fused_on: The type of device on which one kernel prepares queries and keys, or None.
        key_lengths: int64 `[B]` on the CPU: valid video and text keys of each item.
        device_key_lengths: The same as int32 on the device of the latents.
        valid_blocks: Blocks that dense attention computes in a layer, over batch and heads.
    """

    sparse: bool
    reason: str | None
    needs_grad: bool
    backend: str | None
    threshold: float | None
    fused_on: str | None
    key_lengths: Tensor
    device_key_lengths: Tensor
    valid_blocks: int


@dataclass(slots=True)
class _Forward:
    """A forward pass as recorded, the numbers of kept blocks still on the device."""

    step: int
    forward_pass: int
    timestep: float
    plan: ForwardPlan
    states: tuple[State, ...] = ()
    kept: Tensor | None = None


class Recorder:
    """Collects what the layers did in the latest generation, without waiting for the device."""

    def __init__(self, layer_names: Sequence[str], attentions: Sequence[nn.Module]) -> None:
        self.layer_names = tuple(layer_names)
        self.slots = [LayerSlot() for _ in attentions]
        for attention, slot in zip(attentions, self.slots, strict=True):
            setattr(attention, SLOT_NAME, slot)
        self.num_refused = 0
        self._forwards: collections.deque[_Forward] = collections.deque(maxlen=_MAX_FORWARDS)

    def start_generation(self) -> None:
        """Forget the generation before."""
        self._forwards.clear()
        self.num_refused = 0

    def begin_forward(
        self, tracker: StepTracker, inputs: ForwardInputs, plan: ForwardPlan
    ) -> None:
        """Open the record of a forward pass and empty the slots."""
        assert tracker.step is not None
        self._forwards.append(_Forward(tracker.step, tracker.forward_pass, inputs.timestep, plan))
        for slot in self.slots:
            slot.state = "skipped"
            slot.kept = None

    def end_forward(self) -> None:
        """Take over what the slots hold; harmless when done twice."""
        if not self._forwards:
            return
        latest = self._forwards[-1]
        latest.states = tuple(slot.state for slot in self.slots)
        kept = [slot.kept for slot in self.slots if slot.kept is not None]
        # A model spread over devices has its numbers on all of them.
        latest.kept = torch.stack([count.to(kept[0].device) for count in kept]) if kept else None

    def report(self) -> SparsityReport:
        """The latest generation up to now; waits for the device."""
        self.end_forward()
        for forward in self._forwards:
            if forward.kept is not None:
                # Kept there: a report after every step copies each number once.
                forward.kept = forward.kept.cpu()
        forwards = tuple(_as_run(forward) for forward in self._forwards)
        return SparsityReport(self.layer_names, forwards, self.num_refused)


def _as_run(forward: _Forward) -> ForwardRun:
    plan = forward.plan
    kept = iter([] if forward.kept is None else forward.kept.tolist())
    layers = []
    for state in forward.states:
        if state == "sparse":
            layers.append(LayerRun(state, None, int(next(kept)), plan.valid_blocks))
        elif state == "dense":
            # The plan was sparse, and the layer itself found that it needs gradients.
            layers.append(LayerRun(state, plan.reason or "gradients"))
        else:
            layers.append(LayerRun(state))
    return ForwardRun(
        forward.step,
        forward.forward_pass,
        forward.timestep,
        plan.threshold,
        plan.backend if "sparse" in forward.states else None,
        tuple(layers),
    )


def joint_attentions(transformer: Any) -> dict[str, Any]:
    """{block name: attention module} of all joint-attention layers, double-stream blocks first."""
    return {
        f"{stack}.{number}": block.attn
        for stack in ("transformer_blocks", "single_transformer_blocks")
        for number, block in enumerate(getattr(transformer, stack))
    }
