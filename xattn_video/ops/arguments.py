"""Checks of the arguments of the public functions."""

import math
from collections.abc import Sequence
from numbers import Real

import torch
from torch import Tensor


def check_tensor(name: str, found: object, meaning: str) -> None:
    """Raise unless the argument is a dense tensor that holds numbers."""
    if not isinstance(found, Tensor):
        raise TypeError(
            f"{name} must be a torch.Tensor, {meaning}, got {_describe(found)}; "
            "use torch.as_tensor to convert a list or an array."
        )
    if found.is_nested or found.layout != torch.strided:
        layout = "nested" if found.is_nested else str(found.layout)
        raise TypeError(
            f"{name} must be a dense torch.Tensor, {meaning}, got a {layout} one; convert it, "
            "such as by to_dense(), or to_padded_tensor() and key_lengths."
        )
    if found.device.type == "meta":
        raise ValueError(
            f"{name} must be a torch.Tensor with data, {meaning}, got "
            f"{list(found.shape)} on the meta device; load or create it on the CPU or a GPU."
        )


def check_flag(name: str, found: object) -> None:
    """Raise unless the argument is True or False."""
    if not isinstance(found, bool):
        raise TypeError(f"{name} must be True or False, got {_describe(found)}.")


def check_name(name: str, found: object) -> None:
    """Raise unless the argument is a str; the lookup later checks that the name is known."""
    if not isinstance(found, str):
        raise TypeError(f'{name} must be a str, such as "auto", got {_describe(found)}.')


def check_scale(scale: float | None, query: Tensor) -> float:
    """The softmax scale, 1 / sqrt(D) if None."""
    if scale is None:
        return float(query.shape[-1] ** -0.5)
    if isinstance(scale, bool) or not isinstance(scale, Real):
        raise TypeError(f"scale must be a number or None for 1 / sqrt(D), got {_describe(scale)}.")
    if not math.isfinite(scale):
        raise ValueError(f"scale must be finite, got {scale}; None means 1 / sqrt(D).")
    return float(scale)


def _describe(found: object) -> str:
    """A description of the argument for a message, at most one line long."""
    if found is None or isinstance(found, bool | int | float | str):
        return repr(found)[:60]
    return f"a {type(found).__module__}.{type(found).__qualname__}".replace(" builtins.", " ")


def check_block_size(block_size: int, stride: int = 1) -> None:
    """Raise unless both are positive integers and ``stride`` divides ``block_size``."""
    for name, size in (("block_size", block_size), ("stride", stride)):
        if isinstance(size, bool) or not isinstance(size, int):
            raise TypeError(
                f"{name} must be an integer number of tokens, got {size!r}; pass an int, such "
                "as 64."
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


def check_pair(query: Tensor, key: Tensor, causal: bool) -> None:
    """Query `[B, H, Sq, D]` and key `[B, Hkv, Sk, D]` that belong together."""
    _check_alike({"query": query, "key": key}, causal)


def check_triple(
    query: Tensor, key: Tensor, value: Tensor, causal: bool, suffix: str = ""
) -> None:
    """Query `[B, H, Sq, D]`, key and value `[B, Hkv, Sk, D]` that belong together.

    Inputs that need a gradient are refused: block-sparse attention has none. ``suffix`` ends the
    argument names in messages, as in ``query_states``.
    """
    names = f"query{suffix}", f"key{suffix}", f"value{suffix}"
    _check_alike(dict(zip(names, (query, key, value), strict=True)), causal)
    check_inference(query, key, value)


def _check_alike(tensors: dict[str, Tensor], causal: bool) -> None:
    for name, tensor in tensors.items():
        check_tensor(name, tensor, "[B, H, S, D]")
    check_flag("causal", causal)
    query, key, *values = tensors.values()
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
    if values and values[0].shape != key.shape:
        raise ValueError(f"key and value must have the same shape, got {shapes}.")
    for what in ("dtype", "device"):
        if len({getattr(tensor, what) for tensor in tensors.values()}) > 1:
            found = ", ".join(f"{name} {getattr(t, what)}" for name, t in tensors.items())
            raise ValueError(f"{' and '.join(tensors)} must share one {what}, got {found}.")
    if causal and query.shape[2] > key.shape[2]:
        raise ValueError(
            f"causal attention needs Sq <= Sk, got Sq={query.shape[2]}, Sk={key.shape[2]}: "
            "the first queries would see no key."
        )


def check_same_device(**tensors: Tensor) -> None:
    """Raise unless all tensors are on one device; nothing moves them."""
    if len({tensor.device for tensor in tensors.values()}) > 1:
        found = ", ".join(f"{name} {tensor.device}" for name, tensor in tensors.items())
        raise ValueError(
            f"{' and '.join(tensors)} must be on one device, got {found}; move one to the other."
        )


def check_inference(*tensors: Tensor) -> None:
    """Raise if an input needs a gradient, which block-sparse attention does not have."""
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        raise ValueError(
            "block-sparse attention has no gradient; run under torch.no_grad(), or use "
            "torch.nn.functional.scaled_dot_product_attention where gradients are needed."
        )


def check_text(num_text_tokens: int, query: Tensor, key: Tensor, causal: bool) -> None:
    """Raise unless the text tokens fit in the keys and leave room for video tokens."""
    if isinstance(num_text_tokens, bool) or not isinstance(num_text_tokens, int):
        raise TypeError(
            "num_text_tokens must be an int (a number of tokens), "
            f"got {_describe(num_text_tokens)}."
        )
    Sq, Sk = query.shape[2], key.shape[2]
    if not 0 <= num_text_tokens < Sk:
        raise ValueError(
            f"num_text_tokens must lie between 0 and Sk - 1 = {Sk - 1}, got {num_text_tokens}."
        )
    if num_text_tokens and (causal or Sq < Sk):
        raise ValueError(
            "joint text-video attention is not causal and has a query for every key, got "
            f"causal={causal}, Sq={Sq}, Sk={Sk}; pass num_text_tokens=0 otherwise."
        )


def check_key_lengths(
    key_lengths: Tensor | Sequence[int] | None, query: Tensor, key: Tensor
) -> Tensor | None:
    """Key lengths as int32 `[B]` on the query's device, within 1 to Sk.

    A value out of range raises if it is on the CPU. On another device it is clamped, because a
    check would make the host wait.
    """
    if key_lengths is None:
        return None
    try:
        lengths = torch.as_tensor(key_lengths)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(
            "key_lengths must be a tensor or a list of integers, one per item of the batch, got "
            f"{_describe(key_lengths)} ({error})."
        ) from error
    check_tensor("key_lengths", lengths, "[B]")
    inexact = lengths.is_floating_point() or lengths.is_complex()
    if lengths.shape != query.shape[:1] or inexact or lengths.dtype == torch.bool:
        raise ValueError(
            f"key_lengths must hold one integer per item of the batch, [{query.shape[0]}], "
            f"got {lengths.dtype} {list(lengths.shape)}."
        )
    out: Tensor = torch.ops.xattn_video.key_lengths(lengths, key.shape[2], query.device)
    return out


def check_thresholds(
    threshold: float | Tensor, rows: Sequence[int], device: torch.device
) -> Tensor:
    """The threshold as a float32 tensor on the device that broadcasts to the rows, `[B, H, Nq]`.

    A value out of range raises if it is on the CPU; values on other devices are not checked.
    """
    if not isinstance(threshold, Tensor):
        return torch.full((), check_threshold(threshold), device=device, dtype=torch.float32)
    check_tensor("threshold", threshold, "of shares in (0, 1]")
    if threshold.dtype == torch.bool or threshold.is_complex():
        raise TypeError(f"threshold must hold real numbers in (0, 1], got {threshold.dtype}.")
    if not broadcasts(threshold, rows):
        raise ValueError(
            f"threshold must broadcast to [B, H, Nq] = {list(rows)}, got {list(threshold.shape)}; "
            "one per head is [H, 1]."
        )
    out: Tensor = torch.ops.xattn_video.threshold(threshold, device)
    return out


def broadcasts(tensor: Tensor, shape: Sequence[int]) -> bool:
    """Whether the tensor can be expanded to the shape."""
    axes = zip(reversed(tensor.shape), reversed(shape), strict=False)
    return tensor.dim() <= len(shape) and all(found in (1, want) for found, want in axes)


# The two checks that read values are custom operators, because torch.compile has no values.
def _key_lengths(lengths: Tensor, num_keys: int, device: torch.device) -> Tensor:
    if lengths.dtype != torch.int32:
        # Sk would wrap around in a type that cannot hold it.
        lengths = lengths.long()
    if lengths.device.type == "cpu" and not bool(((lengths >= 1) & (lengths <= num_keys)).all()):
        raise ValueError(
            f"key_lengths must lie between 1 and Sk={num_keys}, got {lengths.tolist()}; "
            "an item needs at least one key."
        )
    return lengths.clamp(1, num_keys).to(device=device, dtype=torch.int32, non_blocking=True)


def _threshold(threshold: Tensor, device: torch.device) -> Tensor:
    if threshold.device.type == "cpu" and not bool(((threshold > 0) & (threshold <= 1)).all()):
        raise ValueError(
            f"threshold must lie in (0, 1], got values from {threshold.min().item()} "
            f"to {threshold.max().item()}; try 0.9 or 0.95."
        )
    return threshold.to(device=device, dtype=torch.float32, copy=True)


_key_lengths_op = torch.library.custom_op(
    "xattn_video::key_lengths",
    _key_lengths,
    mutates_args=(),
    schema="(Tensor lengths, SymInt num_keys, Device device) -> Tensor",
)
_threshold_op = torch.library.custom_op(
    "xattn_video::threshold",
    _threshold,
    mutates_args=(),
    schema="(Tensor threshold, Device device) -> Tensor",
)


@_key_lengths_op.register_fake
def _(lengths: Tensor, num_keys: int, device: torch.device) -> Tensor:
    return lengths.new_empty(lengths.shape, dtype=torch.int32, device=device)


@_threshold_op.register_fake
def _(threshold: Tensor, device: torch.device) -> Tensor:
    return threshold.new_empty(threshold.shape, dtype=torch.float32, device=device)
