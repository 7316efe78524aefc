"""Decides, once per forward pass, whether long causal attention runs sparse.

transformers calls a mask function once per forward pass and kind of layer. Its arguments suffice
to decide. If attention can run sparse, the mask function returns the bounds of the valid keys
instead of a mask.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor
from transformers.masking_utils import causal_mask_function

DenseMaskReason: TypeAlias = Literal[
    "decode", "gradients", "window", "other mask", "short chunk", "too few tokens", "gaps"
]

TOO_FEW: Literal["too few tokens"] = "too few tokens"
# In bounds that travel as a mask.
_MARK = 0x58415454


@dataclass(frozen=True, slots=True)
class CausalBounds:
    """The valid keys of each item, one contiguous run; a query sees those up to its own.

    Attributes:
        first: The first key of each item that is not padding.
        last: One past the last key of each item that is not padding.
        stop: Number of keys up to and including the last query; the rest of a static cache is
            still empty.
        sparse: Whether each item has enough keys for sparse attention. If not, dense attention
            still needs no mask over all queries and keys.
    """

    first: tuple[int, ...]
    last: tuple[int, ...]
    stop: int
    sparse: tuple[bool, ...]

    @property
    def padded(self) -> bool:
        """Whether any item has padding."""
        return any(self.first) or any(last != self.stop for last in self.last)

    def rows(self, q_length: int) -> tuple[slice, ...]:
        """Each item's queries that are not padding, among the last ``q_length``; may be empty."""
        before = self.stop - q_length
        return tuple(
            slice(max(first - before, 0), max(last - before, 0))
            for first, last in zip(self.first, self.last, strict=True)
        )

    def to_tensor(self) -> Tensor:
        """int64 `[B, 1, 1, 5]`, on the CPU.

        A 4-D tensor passes through all code that handles masks. Its dtype, its shape and a number
        in it distinguish it from a mask.
        """
        items = zip(self.first, self.last, self.sparse, strict=True)
        rows = [[first, last, self.stop, int(sparse), _MARK] for first, last, sparse in items]
        return torch.tensor(rows)[:, None, None]

    @classmethod
    def of(cls, mask: Tensor | None) -> "CausalBounds | None":
        """The bounds that `to_tensor` wrote; None for a real mask."""
        if mask is None or mask.dtype != torch.int64 or mask.shape[1:] != (1, 1, 5):
            return None
        items = mask[:, 0, 0].tolist()
        first, last, _, sparse, marks = zip(*items, strict=True)
        if set(marks) != {_MARK}:
            return None
        return cls(first, last, items[0][2], tuple(map(bool, sparse)))


@dataclass(frozen=True, slots=True)
class MaskRequest:
    """The arguments of a mask function that matter for the decision.

    Attributes:
        batch_size, q_length, kv_length: Sizes of the attention; empty cache entries count.
        q_offset: Tokens before the first query. A static cache has it on the device.
        kv_offset: Tokens before the first key.
        mask_function: Which keys a query sees, apart from padding.
        attention_mask: bool `[B, tokens]`, False is padding; None without padding.
        allow_is_causal_skip: Whether a plain causal mask may be omitted.
        local_size: Most tokens that a query sees, if the layers limit them.
        device: The device of the layers.
    """

    batch_size: int
    q_length: int
    kv_length: int
    q_offset: "int | Tensor" = 0
    kv_offset: int = 0
    mask_function: Callable[..., Any] = causal_mask_function
    attention_mask: Tensor | None = None
    allow_is_causal_skip: bool = True
    local_size: int | None = None
    device: torch.device | str = "cpu"

    @classmethod
    def of(cls, arguments: Mapping[str, Any]) -> "MaskRequest":
        """The request in the arguments of a mask function."""
        return cls(**{name: arguments[name] for name in cls.__slots__ if name in arguments})


def decide_prefill(
    request: MaskRequest, *, block_size: int, min_tokens: int
) -> CausalBounds | DenseMaskReason:
    """The bounds of plain causal attention, or why it runs dense under a mask.

    Args:
        request: The mask that transformers requests.
        block_size: With fewer queries, attention runs dense.
        min_tokens: With fewer keys, an item runs dense. If none can have as many and there is
            padding on the left, all run under one mask.
    """
    if request.q_length == 1:
        return "decode"
    if torch.is_grad_enabled():
        return "gradients"
    if request.local_size is not None:
        return "window"
    plain = request.mask_function is causal_mask_function and request.allow_is_causal_skip
    if not plain or request.kv_offset != 0:
        return "other mask"
    if request.q_length < block_size:
        return "short chunk"
    # The offset may be on the device; this waits for it once per forward pass of a prefill.
    stop = int(request.q_offset) + request.q_length
    if stop > request.kv_length:
        return "other mask"
    runs = _valid_keys(request, stop)
    if runs is None:
        return "gaps"
    first, last = runs
    if stop >= min_tokens:
        lengths = (end - start for start, end in zip(first, last, strict=True))
        return CausalBounds(first, last, stop, tuple(length >= min_tokens for length in lengths))
    if any(first):
        return TOO_FEW
    # In causal attention valid rows do not see padding on their right.
    return CausalBounds(first, (stop,) * len(first), stop, (False,) * len(first))


def _valid_keys(request: MaskRequest, stop: int) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """First and end of each item's valid keys; None if an item's are not contiguous."""
    if request.attention_mask is None:
        return (0,) * request.batch_size, (stop,) * request.batch_size
    seen = request.attention_mask[:, :stop].to(torch.int8)
    if seen.shape[1] != stop:
        return None
    number = seen.sum(dim=1)
    # If an item is all padding so far, its keys begin later.
    first = seen.argmax(dim=1).where(number > 0, stop)
    last = stop - seen.flip(1).argmax(dim=1)
    whole = last - first == number
    starts, ends, sound = torch.stack([first, last, whole.long()]).tolist()
    return (tuple(starts), tuple(ends)) if all(sound) else None
