"""Block-sparse attention, and XAttention on top of it: score, select, attend."""

from collections.abc import Sequence
from typing import Literal, overload

import torch
from torch import Tensor

from xattn_video.backends.table import load_backend, resolve_backend
from xattn_video.ops.arguments import (
    check_block_size,
    check_key_lengths,
    check_movable,
    check_pair,
    check_same_device,
    check_threshold,
)
from xattn_video.ops.blocks import BlockLists
from xattn_video.ops.forced import ForcedBlocks
from xattn_video.ops.problem import AttentionInputs, empty_output
from xattn_video.ops.scoring import Precision, block_scores
from xattn_video.ops.selection import select_block_lists


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
    """Attention over the kept blocks alone; the softmax runs over their valid keys.

    Args:
        query: `[B, H, Sq, D]`, any strides.
        key: `[B, Hkv, Sk, D]`, same dtype and device. Hkv divides H: each key head serves
            H / Hkv query heads in a row, which have blocks of their own.
        value: `[B, Hkv, Sk, D]`, likewise.
        block_mask: bool `[B, H, Nq, Nk]`, same device, broadcast over B and H; True = compute.
        block_size: Tokens in a block, of queries and of keys.
        causal: Query t sees keys up to t + Sk - Sq.
        key_lengths: int `[B]`, valid keys of each item; see `block_scores`.
        scale: Softmax scale, 1 / sqrt(D) if None.
        backend: A name from `available_backends`, or ``"auto"``.

    Returns:
        `[B, H, Sq, D]`, stored `[B, Sq, H, D]`. A query with no key to see gets 0.

    Raises:
        ValueError: Shapes, dtypes or devices disagree, or the inputs need gradients.
        BackendUnavailableError: The backend cannot run this, with every reason.
    """
    _check_inference(query, key, value)
    check_pair(query, key, causal, value)
    check_block_size(block_size)
    expected = [*query.shape[:2], -(-query.shape[2] // block_size), -(-key.shape[2] // block_size)]
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
    out: Tensor = torch.ops.xattn_video.block_sparse_attention(
        query,
        key,
        value,
        block_mask.expand(expected),
        _as_lengths(key_lengths, query),
        block_size,
        causal,
        query.shape[-1] ** -0.5 if scale is None else scale,
        backend,
    )
    return out


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
    valid block. Queries may go on where the keys have been cut (padded text): their rows are
    finite and unspecified.

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
        scoring_precision: ``"exact"``, ``"float8"`` for 8-bit operands in the estimate alone, or
            ``"auto"`` for the faster of them; the ``precision`` of `block_scores`.
        return_block_mask: Also return the block mask.

    Returns:
        `[B, H, Sq, D]`, stored `[B, Sq, H, D]`; with ``return_block_mask`` also the bool
        `[B, H, Nq, Nk]` mask of computed blocks.

    Raises:
        ValueError, TypeError: An argument is out of range or of a wrong type, or shapes, dtypes
            or devices disagree.
        BackendUnavailableError: The backend cannot run this, with every reason.
    """
    out, blocks = attend_selected(
        query,
        key,
        value,
        threshold=threshold,
        stride=stride,
        block_size=block_size,
        causal=causal,
        num_text_tokens=num_text_tokens,
        key_lengths=key_lengths,
        scale=scale,
        backend=backend,
        scoring_precision=scoring_precision,
    )
    return (out, blocks.to_mask()) if return_block_mask else out


def attend_selected(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    threshold: float | Tensor,
    stride: int,
    block_size: int,
    causal: bool = False,
    num_text_tokens: int = 0,
    key_lengths: Tensor | Sequence[int] | None = None,
    scale: float | None = None,
    backend: str = "auto",
    scoring_precision: Precision = "auto",
) -> tuple[Tensor, BlockLists]:
    """`xattention`, and the blocks that it computed as lists: no block mask is made."""
    _check_inference(query, key, value)
    check_pair(query, key, causal, value)
    check_block_size(block_size, stride)
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
    if not isinstance(threshold, Tensor):
        threshold = torch.full((), check_threshold(threshold), device=query.device)
    check_movable("threshold", threshold, query)
    out, counts, indices = torch.ops.xattn_video.xattention(
        query,
        key,
        value,
        threshold,
        _as_lengths(key_lengths, query),
        stride,
        block_size,
        causal,
        num_text_tokens,
        query.shape[-1] ** -0.5 if scale is None else scale,
        backend,
        scoring_precision,
    )
    return out, BlockLists(counts, indices)


def score_and_select(
    query: Tensor,
    key: Tensor,
    threshold: Tensor,
    *,
    stride: int,
    block_size: int,
    causal: bool = False,
    num_text_tokens: int = 0,
    key_lengths: Tensor | None = None,
    scale: float | None = None,
    scoring_precision: Precision = "auto",
) -> BlockLists:
    """The blocks that `xattention` computes, and no attention; arguments as there."""
    scores = block_scores(
        query,
        key,
        block_size=block_size,
        stride=stride,
        causal=causal,
        key_lengths=key_lengths,
        scale=scale,
        precision=scoring_precision,
    )
    forced = ForcedBlocks(
        query.shape[2], key.shape[2], block_size, causal, num_text_tokens, key_lengths
    )
    return select_block_lists(scores, threshold, forced)


def _check_inference(*tensors: Tensor) -> None:
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        raise ValueError(
            "block-sparse attention has no gradient; run under torch.no_grad(), or use "
            "torch.nn.functional.scaled_dot_product_attention where gradients are needed."
        )


def _as_lengths(key_lengths: Tensor | Sequence[int] | None, query: Tensor) -> Tensor | None:
    if key_lengths is None:
        return None
    lengths = torch.as_tensor(key_lengths)
    # Given a meta tensor the operators would run their fake implementations.
    check_movable("key_lengths", lengths, query)
    return lengths


def _block_sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block_mask: Tensor,
    key_lengths: Tensor | None,
    block_size: int,
    causal: bool,
    scale: float,
    backend: str,
) -> Tensor:
    lengths = check_key_lengths(key_lengths, query, key)
    blocks = BlockLists.from_mask(block_mask)
    inputs = AttentionInputs(query, key, value, blocks, block_size, causal, lengths, scale)
    return load_backend(resolve_backend(backend, inputs.problem)).forward(inputs)


def _xattention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    threshold: Tensor,
    key_lengths: Tensor | None,
    stride: int,
    block_size: int,
    causal: bool,
    num_text_tokens: int,
    scale: float,
    backend: str,
    scoring_precision: Precision = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    lengths = check_key_lengths(key_lengths, query, key)
    blocks = score_and_select(
        query,
        key,
        threshold,
        stride=stride,
        block_size=block_size,
        causal=causal,
        num_text_tokens=num_text_tokens,
        key_lengths=lengths,
        scale=scale,
        scoring_precision=scoring_precision,
    )
    inputs = AttentionInputs(query, key, value, blocks, block_size, causal, lengths, scale)
    out = load_backend(resolve_backend(backend, inputs.problem)).forward(inputs)
    return out, blocks.counts, blocks.indices


# Opaque to torch.compile, so that a compiled transformer keeps whole graphs: the schemas are
# written out because their inference from annotations differs between versions of torch.
_attention_op = torch.library.custom_op(
    "xattn_video::block_sparse_attention",
    _block_sparse_attention,
    mutates_args=(),
    schema=(
        "(Tensor query, Tensor key, Tensor value, Tensor block_mask, Tensor? key_lengths, "
        "int block_size, bool causal, float scale, str backend) -> Tensor"
    ),
)
_xattention_op = torch.library.custom_op(
    "xattn_video::xattention",
    _xattention,
    mutates_args=(),
    schema=(
        "(Tensor query, Tensor key, Tensor value, Tensor threshold, Tensor? key_lengths, "
        "int stride, int block_size, bool causal, int num_text_tokens, float scale, str backend, "
        "str scoring_precision='auto') -> (Tensor, Tensor, Tensor)"
    ),
)


@_attention_op.register_fake
def _(query: Tensor, *_: object) -> Tensor:
    return empty_output(query)


@_xattention_op.register_fake
def _(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    threshold: Tensor,
    key_lengths: Tensor | None,
    stride: int,
    block_size: int,
    *_: object,
) -> tuple[Tensor, Tensor, Tensor]:
    B, H, Sq, _D = query.shape
    rows, columns = -(-Sq // block_size), -(-key.shape[2] // block_size)
    counts = query.new_empty(B, H, rows, dtype=torch.int32)
    return empty_output(query), counts, counts.new_empty(B, H, rows, columns)
