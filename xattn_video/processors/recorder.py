"""Holds what each layer must do in a forward pass, and records what it did."""

import collections
import itertools
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar, TypeAlias

import torch
from torch import Tensor, nn

from xattn_video.backends.table import load_backend
from xattn_video.ops.blocks import BlockLists, ForcedBlocks
from xattn_video.ops.problem import AttentionInputs
from xattn_video.policy.decision import Decision, DenseReason
from xattn_video.policy.report import ForwardRun, LayerRun, SparsityReport, State
from xattn_video.policy.settings import SparseSettings
from xattn_video.processors.head_exchange import HeadExchange
from xattn_video.processors.kept import KeptByPass
from xattn_video.processors.layout import TokenLayout

SLOT_NAME = "_xattn_slot"

# Forward passes of one generation that are kept for the report; the oldest are dropped first.
_MAX_FORWARDS = 4096


@dataclass(frozen=True, slots=True)
class AttendedLayer:
    """What an observer receives for a layer: tensors in canonical order, `[B, S, H, D]`.

    Under context parallelism they hold all tokens of this rank's heads, which change from step to
    step.

    Args:
        layer: The name of the layer.
        forward: The forward pass.
        query, key, value: The tensors, padded text included.
        blocks: The blocks that were computed; None if the layer ran dense.
    """

    layer: str
    forward: "ForwardPass"
    query: Tensor
    key: Tensor
    value: Tensor
    blocks: BlockLists | None


Observer: TypeAlias = Callable[[AttendedLayer], None]
BackendForward: TypeAlias = Callable[[AttentionInputs], tuple[Tensor, Tensor | None]]
SparseOperator: TypeAlias = Callable[
    [Tensor, Tensor, Tensor, Tensor, "ForwardPass", BlockLists | None],
    tuple[Tensor, BlockLists | None],
]
"""Query, key, value `[B, S, H, D]` in canonical order, tau, pass, blocks to compute (None chooses
them) -> output and its blocks."""


@dataclass(frozen=True, slots=True)
class ForwardPass:
    """What all layers share in one forward pass.

    Args:
        settings: The settings of sparse attention.
        decision: Which layers run dense, and why.
        layout: The layout of the tokens.
        device_key_lengths: int32 `[B]` on the layers' device if the items differ, else None.
        backend: The backend of sparse attention; None if all layers run dense.
        dense_backend: The Diffusers attention backend that the user chose for dense layers, or
            None.
        exchange: The exchange between ranks under context parallelism, else None.
        operator: The function that computes a sparse layer.
        observers: Functions that are called after the attention of every layer.
        kept: What the layers keep for later steps; None if nothing is kept.

    Attributes:
        longest: Number of valid keys of the longest item.
        forced: The blocks that every selection keeps.
        attend: The backend's function, which returns the log-sum-exp if compensation needs it;
            None if all layers run dense.
    """

    settings: SparseSettings
    decision: Decision
    layout: TokenLayout
    device_key_lengths: Tensor | None
    backend: str | None
    dense_backend: Any
    exchange: HeadExchange | None
    operator: SparseOperator
    observers: tuple[Observer, ...]
    kept: KeptByPass | None = None
    longest: int = field(init=False)
    forced: ForcedBlocks = field(init=False)
    attend: "BackendForward | None" = field(init=False)

    def __post_init__(self) -> None:
        # Looked up once for all layers.
        attend = None
        if self.backend is not None:
            forward = load_backend(self.backend).forward
            attend = partial(forward, return_lse=self.settings.needs_lse)
        layout, longest = self.layout, max(self.layout.key_lengths)
        forced = ForcedBlocks(
            layout.num_tokens,
            longest,
            self.settings.block_size,
            layout.causal,
            longest - layout.num_video_tokens,
            self.device_key_lengths,
        )
        object.__setattr__(self, "longest", longest)
        object.__setattr__(self, "forced", forced)
        object.__setattr__(self, "attend", attend)


class LayerSlot:
    """What one layer must do in the current forward pass, and what it did.

    The slot is an attribute of the layer's attention module. Compiled code thus finds it without
    the layer's number, which would make torch.compile compile every layer separately.

    Attributes:
        name: The name of the layer.
        attention: The processor of its family; None in a copy until the copy is bound.
        forward: The current forward pass; None between passes.
        handle: int64 scalar on the CPU that identifies the slot in a compiled graph.
        fuses: Whether one kernel prepares queries and keys on the layers' device.
        reason: Why the layer must run dense; None if it must run sparse.
        threshold: Tau, a scalar or `[H, 1]`; None if the layer computes no sparse output.
        state, kept: What it did, and how many blocks it computed, a scalar on the device.
        refreshed: Whether it computed both outputs.
        head_order: The order of heads in the next sparse step; see `HeadExchange`.
        imbalance: Blocks of the busiest rank over the mean, a scalar on the device.
    """

    _numbers: ClassVar[Any] = itertools.count()
    _by_number: ClassVar[Any] = weakref.WeakValueDictionary()

    def __init__(self, name: str = "", attention: Callable[..., Any] | None = None) -> None:
        self.name = name
        self.attention = attention
        self.forward: ForwardPass | None = None
        self.fuses = False
        self.reason: DenseReason | None = None
        self.threshold: Tensor | None = None
        self.state: State = "skipped"
        self.kept: Tensor | None = None
        self.refreshed = False
        self.head_order: Tensor | None = None
        self.imbalance: Tensor | None = None
        number = next(self._numbers)
        self.handle = torch.tensor(number, device="cpu")
        self._by_number[number] = self

    def __reduce__(self) -> tuple[type, tuple[str]]:
        # The layer of a copy has not run yet.
        return type(self), (self.name,)

    @classmethod
    def of_handle(cls, handle: Tensor) -> "LayerSlot":
        """The slot that belongs to a handle in a compiled graph."""
        slot: LayerSlot = cls._by_number[int(handle)]
        return slot


@dataclass(slots=True)
class _Record:
    """The record of a forward pass; the numbers of kept blocks are still on the device."""

    step: int
    forward_pass: int
    timestep: float
    threshold: float | None
    backend: str | None
    valid_blocks: int
    states: tuple[State, ...] = ()
    reasons: tuple[DenseReason | None, ...] = ()
    refreshed: tuple[bool, ...] = ()
    kept: Tensor | None = None
    imbalance: Tensor | None = None


class Recorder:
    """Collects what the layers did in the latest generation, without waiting for the device."""

    def __init__(
        self,
        layer_names: Sequence[str],
        attentions: Sequence[nn.Module],
        attention: Callable[..., Any],
    ) -> None:
        self.layer_names = tuple(layer_names)
        self.slots = [LayerSlot(name, attention) for name in layer_names]
        for attention, slot in zip(attentions, self.slots, strict=True):
            setattr(attention, SLOT_NAME, slot)
        self.num_refused = 0
        self._records: collections.deque[_Record] = collections.deque(maxlen=_MAX_FORWARDS)

    def start_generation(self) -> None:
        """Forget the previous generation."""
        self._records.clear()
        self.num_refused = 0

    def begin_forward(
        self, forward: ForwardPass, step: int, forward_pass: int, timestep: float, num_heads: int
    ) -> None:
        """Open the record of a forward pass and hand it to the slots."""
        valid = forward.layout.count_valid_blocks(forward.settings.block_size) * num_heads
        threshold = forward.decision.threshold
        self._records.append(
            _Record(step, forward_pass, timestep, threshold, forward.backend, valid)
        )
        for slot in self.slots:
            slot.forward = forward
            slot.state = "skipped"
            slot.kept = slot.imbalance = None
            slot.refreshed = False

    def end_forward(self) -> None:
        """Copy the results from the slots into the record. A second call changes nothing."""
        for slot in self.slots:
            slot.forward = None
        if not self._records:
            return
        latest = self._records[-1]
        latest.reasons = tuple(slot.reason for slot in self.slots)
        latest.refreshed = tuple(slot.refreshed for slot in self.slots)
        latest.kept = _stacked([slot.kept for slot in self.slots])
        latest.imbalance = _stacked([slot.imbalance for slot in self.slots])
        # Last, since another thread may report meanwhile: with its states a record is complete.
        latest.states = tuple(slot.state for slot in self.slots)

    def report(self) -> SparsityReport:
        """The report of the latest generation so far; waits for the device."""
        # Another thread may run the model and add records.
        records = tuple(record for record in tuple(self._records) if record.states)
        for record in records:
            if record.kept is not None:
                # Stored on the CPU, so that a report after every step copies each number once.
                record.kept = record.kept.cpu()
            if record.imbalance is not None:
                record.imbalance = record.imbalance.cpu()
        runs = tuple(map(_as_run, records))
        return SparsityReport(self.layer_names, runs, self.num_refused)


def _stacked(found: list[Tensor | None]) -> Tensor | None:
    """The layers' numbers on one device; a model may be spread over several."""
    numbers = [number for number in found if number is not None]
    return torch.stack([number.to(numbers[0].device) for number in numbers]) if numbers else None


def _as_run(record: _Record) -> ForwardRun:
    kept = iter([] if record.kept is None else record.kept.tolist())
    layers = []
    for state, reason, refreshed in zip(
        record.states, record.reasons, record.refreshed, strict=True
    ):
        if state == "sparse":
            layers.append(LayerRun(state, None, int(next(kept)), record.valid_blocks, refreshed))
        elif state == "dense":
            # Without a reason, the layer found only at run time that it needs gradients.
            layers.append(
                LayerRun(state, reason or "gradients", None, record.valid_blocks, refreshed)
            )
        else:
            layers.append(LayerRun(state))
    return ForwardRun(
        record.step,
        record.forward_pass,
        record.timestep,
        record.threshold,
        record.backend if "sparse" in record.states else None,
        tuple(layers),
        None if record.imbalance is None else float(record.imbalance.mean()),
    )
