"""The residual: the difference between a layer's dense and sparse output.

A refresh computes both outputs and keeps the residual in 8 bits. Until the next refresh it is
added to the layer's sparse output.
"""

import logging
from dataclasses import dataclass
from typing import Literal, TypeAlias

import psutil
import torch
from torch import Tensor

from xattn_video.errors import ResidualMemoryError
from xattn_video.policy.residual_size import residual_bytes
from xattn_video.policy.settings import ResidualPlace

Place: TypeAlias = Literal["device", "host"]

_LARGEST = 127
# Peak memory of one forward pass, in tensors of the size of a layer's output.
_ACTIVATION_TENSORS = 18
# Torch rounds pinned memory up to a power of two; longer tensors are cut to waste little.
_PIECE_BYTES = 1 << 26
_GIB = 2**30
logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Residual:
    """int8 `[B, S, H, D]` and a scale for each token and head, `[B, S, H, 1]`."""

    values: Tensor
    scales: Tensor

    @classmethod
    def between(cls, dense: Tensor, approximate: Tensor) -> "Residual":
        """The residual, from the dense and the approximate output, `[B, S, H, D]`."""
        residual = dense - approximate
        largest = torch.linalg.vector_norm(residual, ord=torch.inf, dim=-1, keepdim=True)
        # Under autocast norms are float32.
        scales = (largest / _LARGEST).to(dense.dtype).clamp_min_(torch.finfo(dense.dtype).tiny)
        scaled = residual.div_(scales).round_().clamp_(-_LARGEST, _LARGEST)
        return cls(scaled.to(torch.int8), scales)

    @classmethod
    def empty_like(cls, other: "Residual", device: torch.device) -> "Residual":
        """An uninitialised residual of the same shape."""
        tensors = (other.values, other.scales)
        return cls(*(torch.empty(t.shape, dtype=t.dtype, device=device) for t in tensors))

    def added_to(self, approximate: Tensor) -> Tensor:
        """The approximate output plus the residual."""
        return torch.addcmul(approximate, self.values.to(approximate.dtype), self.scales)


class _Pinned:
    """A copy of a tensor in pinned host memory, written and read on the current stream."""

    def __init__(self, tensor: Tensor) -> None:
        self._pieces = [
            torch.empty(piece.shape, dtype=piece.dtype, pin_memory=True).copy_(
                piece, non_blocking=True
            )
            for piece in self._cut(tensor)
        ]

    def copy_to(self, tensor: Tensor) -> None:
        """Copy to a tensor on the device, without waiting."""
        for piece, kept in zip(self._cut(tensor), self._pieces, strict=True):
            piece.copy_(kept, non_blocking=True)

    @staticmethod
    def _cut(tensor: Tensor) -> tuple[Tensor, ...]:
        return tensor.view(-1).split(_PIECE_BYTES // tensor.itemsize)


class _Stage:
    """Two buffers on a device through which residuals go to host memory and come back.

    The copies run on a separate stream, in parallel with the layers. Only events keep the order:
    the host never waits, however far ahead of the device it is, and two buffers are enough.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._buffers: list[Residual] = []
        self._free = [torch.cuda.Event(), torch.cuda.Event()]
        self._ready = [torch.cuda.Event(), torch.cuda.Event()]
        self._turn = 0

    def store(self, residual: Residual) -> tuple[_Pinned, _Pinned]:
        """Copy a residual to host memory."""
        turn, buffer = self._next_buffer(residual)
        current = torch.cuda.current_stream(self._device)
        current.wait_event(self._free[turn])
        # A layer may have fetched into this buffer and failed before adding it.
        current.wait_event(self._ready[turn])
        buffer.values.copy_(residual.values)
        buffer.scales.copy_(residual.scales)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            pinned = _Pinned(buffer.values), _Pinned(buffer.scales)
            self._free[turn].record(self._stream)
        return pinned

    def fetch(self, pinned: tuple[_Pinned, _Pinned]) -> int:
        """Start copying a stored residual to the device; returns the number of its buffer."""
        turn, buffer = self._next_buffer(None)
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(self._free[turn])
            pinned[0].copy_to(buffer.values)
            pinned[1].copy_to(buffer.scales)
            self._ready[turn].record(self._stream)
        return turn

    def add(self, turn: int, approximate: Tensor) -> Tensor:
        """The approximate output plus the fetched residual."""
        current = torch.cuda.current_stream(self._device)
        current.wait_event(self._ready[turn])
        out = self._buffers[turn].added_to(approximate)
        self._free[turn].record(current)
        return out

    def _next_buffer(self, like: Residual | None) -> tuple[int, Residual]:
        kept = self._buffers[0].values.shape if self._buffers else None
        if like is not None and like.values.shape != kept:
            self._buffers = [Residual.empty_like(like, self._device) for _ in range(2)]
            for buffer in self._buffers:
                buffer.values.record_stream(self._stream)
                buffer.scales.record_stream(self._stream)
            self._stream.wait_stream(torch.cuda.current_stream(self._device))
        self._turn = 1 - self._turn
        return self._turn, self._buffers[self._turn]


class PassResiduals:
    """The residuals of one of a step's forward passes, by layer.

    Args:
        place: Where the settings ask to keep them.
        num_layers: Number of layers that may keep one.
    """

    def __init__(self, place: ResidualPlace, num_layers: int) -> None:
        self._asked = place
        self._num_layers = num_layers
        self._place: Place | None = None
        self._kept: dict[str, Residual | tuple[_Pinned, _Pinned]] = {}
        self._fetched: dict[str, int] = {}
        self._stages: dict[torch.device, _Stage] = {}

    def keep(self, layer: str, dense: Tensor, approximate: Tensor) -> None:
        """Keep the residual of a layer's dense and approximate output, both `[B, S, H, D]`.

        Raises:
            ResidualMemoryError: The residuals of all layers do not fit in memory.
        """
        if self._place is None:
            self._place = choose_place(self._asked, dense, self._num_layers)
        # Frees the memory of the previous residual first.
        self._kept.pop(layer, None)
        residual = Residual.between(dense, approximate)
        self._kept[layer] = residual
        if self._place == "host" and dense.is_cuda:
            self._kept[layer] = self._stage(dense.device).store(residual)

    def fetch(self, layer: str, device: torch.device) -> None:
        """Start copying a layer's residual to its device while the layer computes."""
        kept = self._kept[layer]
        if isinstance(kept, tuple):
            self._fetched[layer] = self._stage(device).fetch(kept)

    def add(self, layer: str, approximate: Tensor) -> Tensor:
        """A layer's approximate output plus its residual, after `fetch`."""
        kept = self._kept[layer]
        if isinstance(kept, Residual):
            return kept.added_to(approximate)
        return self._stage(approximate.device).add(self._fetched.pop(layer), approximate)

    def _stage(self, device: torch.device) -> _Stage:
        if device not in self._stages:
            self._stages[device] = _Stage(device)
        return self._stages[device]


def choose_place(asked: ResidualPlace, output: Tensor, num_layers: int) -> Place:
    """Where to keep the residuals of a forward pass; always "device" without a GPU.

    Args:
        asked: The place in the settings.
        output: The output of a layer, `[B, S, H, D]`.
        num_layers: Number of layers that keep a residual.

    Raises:
        ResidualMemoryError: They do not fit where the settings allow.
    """
    batch, tokens, heads, head_dim = output.shape
    needed = residual_bytes(
        batch=batch,
        tokens=tokens,
        heads=heads,
        head_dim=head_dim,
        layers=num_layers,
        scale_bytes=output.element_size(),
    )
    host = psutil.virtual_memory().available
    if not output.is_cuda:
        room: dict[Place, int] = {"device": host}
    else:
        room = {"device": _free_device_bytes(output.device), "host": host}
        if asked == "auto":
            # Other parts of the forward pass hold more memory than this one.
            room["device"] -= _ACTIVATION_TENSORS * output.nbytes
        else:
            room = {asked: room[asked]}
    for place, free in room.items():
        if needed <= free:
            logger.info(
                "residuals of %d layers, %.1f GiB, are kept on %s",
                num_layers,
                needed / _GIB,
                output.device if place == "device" else "the host",
            )
            return place
    found = " and ".join(f"{max(free, 0) / _GIB:.1f} on the {name}" for name, free in room.items())
    raise ResidualMemoryError(
        f"the residuals that refresh_every stores for {num_layers} layers take "
        f"{needed / _GIB:.1f} GiB, but only this much is free: {found}; "
        "make the video smaller, choose another location with residual='host' or 'device', or "
        "omit refresh_every."
    )


def _free_device_bytes(device: torch.device) -> int:
    """Free memory of the device, including what torch has reserved and not used."""
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
