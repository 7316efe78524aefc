"""Block-sparse attention, and XAttention on top of it: score, select, attend."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal, overload

import torch
from torch import Tensor

from xattn_video.backends.table import load_backend, resolve_backend
from xattn_video.ops.arguments import (
    check_block_size,
    check_flag,
    check_key_lengths,
    check_name,
    check_same_device,
    check_scale,
    check_tensor,
    check_text,
    check_thresholds,
    check_triple,
)
from xattn_video.ops.blocks import BlockLists
from xattn_video.ops.problem import AttentionInputs, empty_output
from xattn_video.ops.scoring import Precision, ScoringInputs
from xattn_video.ops.selection import run_select


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    blocks: BlockLists,
    *,
    block_size: int = 128,
    causal: bool = False,
    key_lengths: Tensor | Sequence[int] | None = None,
    scale: float | None = None,
    backend: str = "auto",
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention over the listed blocks only; the softmax runs over their valid keys.

    Args:
        query: `[B, H, Sq, D]`, any strides.
        key: `[B, Hkv, Sk, D]`, same dtype and device. Hkv divides H: each key head serves
            H / Hkv consecutive query heads. Blocks are per query head.
        value: `[B, Hkv, Sk, D]`, likewise.
        blocks: The key blocks of each row of blocks, from `select` or `BlockLists.from_mask`.
        block_size: Tokens in a block, of queries and of keys.
        causal: Query t sees keys up to t + Sk - Sq.
        key_lengths: int `[B]`, valid keys of each item; see `block_scores`.
        scale: Softmax scale, 1 / sqrt(D) if None.
        backend: A name from `available_backends`, or ``"auto"``.
        return_lse: Also return the log-sum-exp.

    Returns:
        `[B, H, Sq, D]`, stored `[B, Sq, H, D]`. The output of a query that sees no key is 0. With
        ``return_lse`` also the natural logarithm of each softmax's denominator, float32
        `[B, H, Sq]`: log(sum(exp(scale * q . k))), -inf for a query that sees no key.

    Raises:
        ValueError, TypeError: An argument is out of range or of a wrong type, or shapes, dtypes
            or devices disagree, or the inputs need gradients.
        BackendUnavailableError: The backend cannot run this problem; lists every reason.
    """
    check_triple(query, key, value, causal)
    check_block_size(block_size)
    check_flag("return_lse", return_lse)
    check_name("backend", backend)
    _check_lists(blocks, query, key, block_size)
    lengths = check_key_lengths(key_lengths, query, key)
    scale = check_scale(scale, query)
    inputs = AttentionInputs(query, key, value, blocks, block_size, causal, lengths, scale)
    out, lse = run_attend(inputs, backend, return_lse)
    return (out, lse) if return_lse else out


def compute_attention(
    inputs: AttentionInputs, backend: str, return_lse: bool = False
) -> tuple[Tensor, Tensor | None]:
    """`attend` for checked inputs; the log-sum-exp is None unless requested."""
    if inputs.scale < 0:
        # Fused kernels take a row's maximum before scaling; a negative scale would reverse it.
        inputs = replace(inputs, query=-inputs.query, scale=-inputs.scale)
    problem = replace(inputs.problem, lse=True) if return_lse else inputs.problem
    return load_backend(resolve_backend(backend, problem)).forward(inputs, return_lse)


def block_sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block_mask: Tensor,
    *,
    block_size: int = 128,
    causal: bool = False,
    key_lengths: Tensor | Sequence[int] | None = None,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Attention over the kept blocks only; the softmax runs over their valid keys.

    Args:
        query: `[B, H, Sq, D]`, any strides.
        key: `[B, Hkv, Sk, D]`, same dtype and device. Hkv divides H: each key head serves
            H / Hkv consecutive query heads. Blocks are per query head.
        value: `[B, Hkv, Sk, D]`, likewise.
        block_mask: bool `[B, H, Nq, Nk]`, same device, broadcast over B and H; True = compute.
        block_size: Tokens in a block, of queries and of keys.
        causal: Query t sees keys up to t + Sk - Sq.
        key_lengths: int `[B]`, valid keys of each item; see `block_scores`.
        scale: Softmax scale, 1 / sqrt(D) if None.
        backend: A name from `available_backends`, or ``"auto"``.

    Returns:
        `[B, H, Sq, D]`, stored `[B, Sq, H, D]`. The output of a query that sees no key is 0.

    Raises:
        ValueError, TypeError: An argument is out of range or of a wrong type, or shapes, dtypes
            or devices disagree, or the inputs need gradients.
        BackendUnavailableError: The backend cannot run this problem; lists every reason.
    """
    check_triple(query, key, value, causal)
    check_block_size(block_size)
    expected = _lists_shape(query, key, block_size)
    check_name("backend", backend)
    check_tensor("block_mask", block_mask, "bool [B, H, Nq, Nk]")
    if block_mask.dtype != torch.bool:
        raise TypeError(f"block_mask must be a bool tensor, got {block_mask.dtype}.")
    if block_mask.dim() != 4 or any(
        found not in (1 if axis < 2 else want, want)
        for axis, (found, want) in enumerate(zip(block_mask.shape, expected, strict=True))
    ):
        raise ValueError(
            f"block_mask must be [B, H, Nq, Nk] = {expected} (B and H may be 1) for query "
            f"{list(query.shape)}, key {list(key.shape)} and block_size={block_size}, "
            f"got {list(block_mask.shape)}."
        )
    check_same_device(query=query, block_mask=block_mask)
    blocks = BlockLists.from_mask(block_mask.expand(expected))
    lengths = check_key_lengths(key_lengths, query, key)
    scale = check_scale(scale, query)
    inputs = AttentionInputs(query, key, value, blocks, block_size, causal, lengths, scale)
    return run_attend(inputs, backend)[0]


@overload
def xattention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    threshold: float | Tensor = ...,
    stride: int = ...,
    block_size: int = ...,
    causal: bool = ...,
    num_text_tokens: int = ...,
    key_lengths: Tensor | Sequence[int] | None = ...,
    scale: float | None = ...,
    backend: str = ...,
    scoring_precision: Precision = ...,
    return_block_mask: Literal[False] = ...,
) -> Tensor: ...


@overload
def xattention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    threshold: float | Tensor = ...,
    stride: int = ...,
    block_size: int = ...,
    causal: bool = ...,
    num_text_tokens: int = ...,
    key_lengths: Tensor | Sequence[int] | None = ...,
    scale: float | None = ...,
    backend: str = ...,
    scoring_precision: Precision = ...,
    return_block_mask: Literal[True],
) -> tuple[Tensor, Tensor]: ...


def xattention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    threshold: float | Tensor = 0.9,
    stride: int = 8,
    block_size: int = 128,
    causal: bool = False,
    num_text_tokens: int = 0,
    key_lengths: Tensor | Sequence[int] | None = None,
    scale: float | None = None,
    backend: str = "auto",
    scoring_precision: Precision = "auto",
    return_block_mask: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """XAttention (arXiv:2503.16428): antidiagonal scores, block selection, block-sparse attention.

    In joint text-video attention the text tokens come last: every block that touches a valid text
    key is computed for every row, and rows of blocks that hold a valid text query compute every
    valid block. There may be more queries than keys (padded text was cut from the keys only);
    the output rows of the additional queries are finite but unspecified.

    Args:
        query: `[B, H, Sq, D]`, any strides.
        key: `[B, Hkv, Sk, D]`, same dtype and device; Hkv divides H, as in
            `block_sparse_attention`.
        value: `[B, Hkv, Sk, D]`, likewise.
        threshold: Share of each row's estimated mass to keep, in (0, 1]; a number or a tensor,
            see `select_blocks`.
        stride: Tokens in a group of the estimate; divides ``block_size``.
        block_size: Tokens in a block.
        causal: Query t sees keys up to t + Sk - Sq; the diagonal and key block 0 are kept.
        num_text_tokens: Text tokens among the Sk keys, padding included.
        key_lengths: int `[B]`, valid keys of each item; see `block_scores`.
        scale: Softmax scale, 1 / sqrt(D) if None.
        backend: A name from `available_backends`, or ``"auto"``.
        scoring_precision: Precision of the scores: ``"exact"``, ``"float8"`` (8-bit operands, for
            the scores only), or ``"auto"``, the faster one; ``precision`` of `block_scores`.
        return_block_mask: Also return the block mask.

    Returns:
        `[B, H, Sq, D]`, stored `[B, Sq, H, D]`; with ``return_block_mask`` also the bool
        `[B, H, Nq, Nk]` mask of computed blocks.

    Raises:
        ValueError, TypeError: An argument is out of range or of a wrong type, or shapes, dtypes
            or devices disagree, or the inputs need gradients.
        BackendUnavailableError: The backend cannot run this problem; lists every reason.
    """
    check_triple(query, key, value, causal)
    check_block_size(block_size, stride)
    check_text(num_text_tokens, query, key, causal)
    check_name("backend", backend)
    check_name("scoring_precision", scoring_precision)
    check_flag("return_block_mask", return_block_mask)
    scale = check_scale(scale, query)
    rows = _lists_shape(query, key, block_size)[:3]
    lengths = check_key_lengths(key_lengths, query, key)
    tau = check_thresholds(threshold, rows, query.device)
    blocks = run_select(
        ScoringInputs(query, key, block_size, stride, causal, lengths, scale, scoring_precision),
        tau,
        num_text_tokens,
    )
    inputs = AttentionInputs(query, key, value, blocks, block_size, causal, lengths, scale)
    out, _ = run_attend(inputs, backend)
    return (out, blocks.to_mask()) if return_block_mask else out


def run_attend(
    inputs: AttentionInputs, backend: str, return_lse: bool = False
) -> tuple[Tensor, Tensor]:
    """`compute_attention` as an opaque operation; the log-sum-exp is empty unless requested."""
    out: Tensor
    lse: Tensor
    out, lse = torch.ops.xattn_video.attend(
        inputs.query,
        inputs.key,
        inputs.value,
        inputs.blocks.counts,
        inputs.blocks.indices,
        inputs.key_lengths,
        inputs.block_size,
        inputs.causal,
        inputs.scale,
        backend,
        return_lse,
    )
    return out, lse


def _check_lists(blocks: object, query: Tensor, key: Tensor, block_size: int) -> None:
    """Raise unless the blocks are lists for these tensors, on their device."""
    if not isinstance(blocks, BlockLists):
        raise TypeError(
            "blocks must be BlockLists, as from select(...) or BlockLists.from_mask(mask), got "
            f"a {type(blocks).__qualname__}."
        )
    check_tensor("blocks.counts", blocks.counts, "int32 [B, H, Nq]")
    check_tensor("blocks.indices", blocks.indices, "int32 [B, H, Nq, Nk]")
    if blocks.counts.dtype != torch.int32 or blocks.indices.dtype != torch.int32:
        raise TypeError(
            "blocks must hold int32 counts and indices, got "
            f"{blocks.counts.dtype} and {blocks.indices.dtype}."
        )
    shape = _lists_shape(query, key, block_size)
    found = [list(blocks.counts.shape), list(blocks.indices.shape)]
    if found != [shape[:3], shape]:
        raise ValueError(
            f"blocks must hold counts [B, H, Nq] = {shape[:3]} and indices [B, H, Nq, Nk] = "
            f"{shape} for query {list(query.shape)}, key {list(key.shape)} and "
            f"block_size={block_size}, got {found[0]} and {found[1]}."
        )
    check_same_device(query=query, counts=blocks.counts, indices=blocks.indices)


def _lists_shape(query: Tensor, key: Tensor, block_size: int) -> list[int]:
    """`[B, H, Nq, Nk]`."""
    B, H, Sq, _ = query.shape
    return [B, H, -(-Sq // block_size), -(-key.shape[2] // block_size)]


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    counts: Tensor,
    indices: Tensor,
    key_lengths: Tensor | None,
    block_size: int,
    causal: bool,
    scale: float,
    backend: str,
    return_lse: bool,
) -> tuple[Tensor, Tensor]:
    blocks = BlockLists(counts, indices)
    inputs = AttentionInputs(query, key, value, blocks, block_size, causal, key_lengths, scale)
    out, lse = compute_attention(inputs, backend, return_lse)
    # A custom operator may return only tensors.
    return out, query.new_empty(0, dtype=torch.float32) if lse is None else lse


# Opaque to torch.compile, so that a compiled model keeps whole graphs: the schema is written out
# because its inference from annotations differs between versions of torch.
_attend_op = torch.library.custom_op(
    "xattn_video::attend",
    _attend,
    mutates_args=(),
    schema=(
        "(Tensor query, Tensor key, Tensor value, Tensor counts, Tensor indices, "
        "Tensor? key_lengths, int block_size, bool causal, float scale, str backend, "
        "bool return_lse) -> (Tensor, Tensor)"
    ),
)


@_attend_op.register_fake
def _(query: Tensor, *arguments: object) -> tuple[Tensor, Tensor]:
    shape = query.shape[:3] if arguments[-1] else (0,)
    return empty_output(query), query.new_empty(shape, dtype=torch.float32)
