"""Checks of the operator's arguments, shared by its parts."""

from collections.abc import Sequence
from numbers import Real

import torch
from torch import Tensor


def check_block_size(block_size: int, stride: int = 1) -> None:
    """A positive block size that ``stride`` divides, both of them integers."""
    for name, size in (("block_size", block_size), ("stride", stride)):
        if isinstance(size, bool) or not isinstance(size, int):
            raise TypeError(
                f"{name} must be an int of tokens, got {size!r}; pass an int, such as 64."
            )
    if block_size < 1:
        raise ValueError(f"block_size must be at least 1 token, got {block_size}; use 64 or 128.")
    if stride < 1 or block_size % stride:
        divisors = [str(n) for n in (1, 2, 4, 8, 16, 32, 64) if block_size % n == 0]
        raise ValueError(
            f"stride must divide block_size, got stride={stride}, block_size={block_size}; "
            f"use {', '.join(divisors)}."
        )


def check_threshold(threshold: object) -> float:
    """A threshold that is one number, in (0, 1]."""
    if isinstance(threshold, bool) or not isinstance(threshold, Real):
        raise TypeError(
            f"threshold must be a number in (0, 1] or a tensor of them, got {threshold!r}; "
            "try 0.9 or 0.95."
        )
    tau = float(threshold)
    if not 0 < tau <= 1:
        raise ValueError(f"threshold must lie in (0, 1], got {tau}; try 0.9 or 0.95.")
    return tau


def check_pair(query: Tensor, key: Tensor, causal: bool, value: Tensor | None = None) -> None:
    """Query `[B, H, Sq, D]`, key and value `[B, Hkv, Sk, D]` that belong together."""
    tensors = {"query": query, "key": key} | ({} if value is None else {"value": value})
    shapes = ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in tensors.items())
    for name, tensor in tensors.items():
        if tensor.dim() != 4:
            raise ValueError(f"{name} must be [B, H, S, D], got {shapes}.")
        if not tensor.is_floating_point():
            raise TypeError(
                f"{name} must be float32, float16 or bfloat16, got {tensor.dtype}; cast it first."
            )
        if 0 in tensor.shape:
            raise ValueError(f"{name} is empty, got {shapes}; every size must be at least 1.")
    if (query.shape[0], query.shape[3]) != (key.shape[0], key.shape[3]):
        raise ValueError(f"query and key must agree in B and D, got {shapes}.")
    if query.shape[1] % key.shape[1]:
        raise ValueError(
            "the heads of key and value must divide those of query, got "
            f"{query.shape[1]} query heads and {key.shape[1]} key heads, {shapes}; "
            "query head h uses key head h // (query heads / key heads)."
        )
    if value is not None and value.shape != key.shape:
        raise ValueError(f"key and value must have the same shape, got {shapes}.")
    for what in ("dtype", "device"):
        if len({getattr(tensor, what) for tensor in tensors.values()}) > 1:
            found = ", ".join(f"{name} {getattr(t, what)}" for name, t in tensors.items())
            raise ValueError(f"query, key and value must share one {what}, got {found}.")
    if causal and query.shape[2] > key.shape[2]:
        raise ValueError(
            f"causal attention needs Sq <= Sk, got Sq={query.shape[2]}, Sk={key.shape[2]}: "
            "the first queries would see no key."
        )


def check_movable(name: str, tensor: Tensor, other: Tensor) -> None:
    """A small tensor may lie on another device than the inputs, but has to hold numbers."""
    if tensor.device.type == "meta" != other.device.type:
        raise ValueError(
            f"{name} must be on {other.device} or a device to copy it from, got "
            f"{tensor.device}, which holds no numbers; pass one on {other.device}."
        )


def check_same_device(**tensors: Tensor) -> None:
    """Tensors that no part moves to each other."""
    if len({tensor.device for tensor in tensors.values()}) > 1:
        found = ", ".join(f"{name} {tensor.device}" for name, tensor in tensors.items())
        raise ValueError(
            f"{' and '.join(tensors)} must be on one device, got {found}; move one to the other."
        )


def check_key_lengths(
    key_lengths: Tensor | Sequence[int] | None, query: Tensor, key: Tensor
) -> Tensor | None:
    """Key lengths as int32 `[B]` on the query's device, within 1 to Sk.

    On the CPU a value out of range raises; on another device it is clamped, because a look at it
    would make the host wait.
    """
    if key_lengths is None:
        return None
    B, Sk = query.shape[0], key.shape[2]
    lengths = torch.as_tensor(key_lengths)
    check_movable("key_lengths", lengths, query)
    inexact = lengths.is_floating_point() or lengths.is_complex()
    if lengths.shape != (B,) or inexact or lengths.dtype == torch.bool:
        raise ValueError(
            f"key_lengths must hold one integer per item of the batch, [{B}], "
            f"got {lengths.dtype} {list(lengths.shape)}."
        )
    if lengths.dtype != torch.int32:
        # Sk would wrap around in a type that cannot hold it.
        lengths = lengths.long()
    if lengths.device.type == "cpu" and not bool(((lengths >= 1) & (lengths <= Sk)).all()):
        raise ValueError(
            f"key_lengths must lie between 1 and Sk={Sk}, got {lengths.tolist()}; "
            "an item needs at least one key."
        )
    return lengths.clamp(1, Sk).to(device=query.device, dtype=torch.int32, non_blocking=True)
