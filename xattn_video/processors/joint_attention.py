"""Joint text-video attention on Diffusers' `[B, S, H, D]`, keys cut to their valid lengths.

Both are opaque to torch.compile: the lengths are read on the host, from a tensor that lives there,
so that prompts of all lengths share one compiled graph.
"""

from collections.abc import Callable
from functools import partial

import torch
from diffusers.models.attention_dispatch import (
    AttentionBackendName,
    _AttentionBackendRegistry,
    dispatch_attention_fn,
)
from torch import Tensor

from xattn_video.backends.dense import attend_with, fastest_dense_kernel
from xattn_video.ops.attention import compute_attention
from xattn_video.ops.problem import AttentionInputs
from xattn_video.ops.scoring import Precision, ScoringInputs
from xattn_video.ops.selection import compute_selection


def dense_attention(
    query: Tensor, key: Tensor, value: Tensor, key_lengths: Tensor, backend: str | None
) -> Tensor:
    """Dense attention without a mask, so that flash-class kernels can run.

    Args:
        query: `[B, S, H, D]`.
        key: `[B, S, H, D]`, the valid ones first.
        value: `[B, S, H, D]`.
        key_lengths: int64 `[B]` on the CPU, valid keys of each item.
        backend: One of Diffusers' attention backends. If None its active one; where that is
            the default, the fastest kernel present on a Hopper GPU.

    Returns:
        `[B, S, H, D]`, contiguous.
    """
    # Diffusers keeps a member of its enumeration.
    name = getattr(backend, "value", backend)
    out: Tensor = torch.ops.xattn_video.joint_dense_attention(query, key, value, key_lengths, name)
    return out


def sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    threshold: Tensor,
    key_lengths: Tensor,
    device_key_lengths: Tensor,
    num_text_tokens: int,
    *,
    stride: int,
    block_size: int,
    backend: str,
    scoring_precision: Precision,
) -> tuple[Tensor, Tensor]:
    """`xattention` over video tokens followed by text tokens.

    Args:
        query: `[B, S, H, D]`.
        key: `[B, S, H, D]`, the valid ones first.
        value: `[B, S, H, D]`.
        threshold: A scalar, or `[H, 1]`.
        key_lengths: int64 `[B]` on the CPU, valid keys of each item.
        device_key_lengths: The same on the device of the query.
        num_text_tokens: The last of the S tokens, padding included.
        stride: Tokens in a group of the estimate.
        block_size: Tokens in a block.
        backend: A name from `xattn_video.available_backends`.
        scoring_precision: See `xattention`.

    Returns:
        The attention's output, `[B, S, H, D]`, contiguous, and the number of blocks computed, an
        int64 scalar on the device of the query.
    """
    out: Tensor
    kept: Tensor
    out, kept = torch.ops.xattn_video.joint_sparse_attention(
        query,
        key,
        value,
        threshold,
        key_lengths,
        device_key_lengths,
        num_text_tokens,
        stride,
        block_size,
        backend,
        scoring_precision,
    )
    return out, kept


def _dense_attention(
    query: Tensor, key: Tensor, value: Tensor, key_lengths: Tensor, backend: str | None
) -> Tensor:
    lengths = key_lengths.tolist()
    if len(set(lengths)) == 1:
        lengths, items = lengths[:1], [slice(None)]
    else:
        items = [slice(number, number + 1) for number in range(len(lengths))]
    attend = _dense_kernel(query, backend)
    outs = [
        attend(query[item], key[item, :length], value[item, :length])
        for item, length in zip(items, lengths, strict=True)
    ]
    # Backends lay their outputs out as they like; a compiled graph relies on one layout.
    return outs[0].contiguous() if len(outs) == 1 else torch.cat(outs)


def _dense_kernel(query: Tensor, backend: str | None) -> Callable[..., Tensor]:
    """Diffusers' dispatch, unless nobody chose a backend and a faster kernel is present."""
    active, _ = _AttentionBackendRegistry.get_active_backend()
    # A kernel that PyTorch was told not to use is a choice too.
    unrestricted = torch.backends.cuda.flash_sdp_enabled() and (
        torch.backends.cuda.cudnn_sdp_enabled()
    )
    if backend is None and active == AttentionBackendName.NATIVE and unrestricted:
        kernel = fastest_dense_kernel(query.device, query.dtype, query.shape[-1])
        if kernel is not None:
            return partial(attend_with, kernel)
    return partial(dispatch_attention_fn, backend=backend)


def _sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    threshold: Tensor,
    key_lengths: Tensor,
    device_key_lengths: Tensor,
    num_text_tokens: int,
    stride: int,
    block_size: int,
    backend: str,
    scoring_precision: Precision,
) -> tuple[Tensor, Tensor]:
    lengths = key_lengths.tolist()
    longest = max(lengths)
    num_video_tokens = query.shape[1] - num_text_tokens
    query = query.transpose(1, 2)
    key, value = (tensor[:, :longest].transpose(1, 2) for tensor in (key, value))
    ragged = None if len(set(lengths)) == 1 else device_key_lengths
    scale = query.shape[-1] ** -0.5
    scoring = ScoringInputs(
        query, key, block_size, stride, False, ragged, scale, scoring_precision
    )
    blocks = compute_selection(scoring, threshold, longest - num_video_tokens)
    inputs = AttentionInputs(query, key, value, blocks, block_size, False, ragged, scale)
    out, _ = compute_attention(inputs, backend)
    return out.transpose(1, 2).contiguous(), blocks.counts.sum()


_dense_op = torch.library.custom_op(
    "xattn_video::joint_dense_attention",
    _dense_attention,
    mutates_args=(),
    schema="(Tensor query, Tensor key, Tensor value, Tensor key_lengths, str? backend) -> Tensor",
)
_sparse_op = torch.library.custom_op(
    "xattn_video::joint_sparse_attention",
    _sparse_attention,
    mutates_args=(),
    schema=(
        "(Tensor query, Tensor key, Tensor value, Tensor threshold, Tensor key_lengths, "
        "Tensor device_key_lengths, SymInt num_text_tokens, int stride, int block_size, "
        "str backend, str scoring_precision) -> (Tensor, Tensor)"
    ),
)


@_dense_op.register_fake
def _(query: Tensor, *_: object) -> Tensor:
    return query.new_empty(query.shape)


@_sparse_op.register_fake
def _(query: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return query.new_empty(query.shape), query.new_empty((), dtype=torch.int64)
