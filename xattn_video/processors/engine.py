"""Computes the attention of a layer from its queries, keys and values.

Only this module chooses between dense and sparse for a layer, exchanges heads for tokens between
ranks, and calls observers. torch.compile sees one opaque operation, so steps, prompts and sizes
need no graphs of their own.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from diffusers.models.attention_dispatch import (
    AttentionBackendName,
    _AttentionBackendRegistry,
    dispatch_attention_fn,
)
from torch import Tensor

from xattn_video.backends.dense import attend_with, fastest_dense_kernel
from xattn_video.errors import UnboundProcessorError
from xattn_video.ops.blocks import BlockLists, select_block_lists
from xattn_video.ops.compensation import compensate, error_weights
from xattn_video.ops.problem import AttentionInputs
from xattn_video.ops.scoring import ScoringInputs, compute_scores
from xattn_video.processors.head_exchange import HeadExchange
from xattn_video.processors.layout import TokenLayout
from xattn_video.processors.recorder import AttendedLayer, ForwardPass, LayerSlot

HOW_TO_BIND = (
    "set it with transformer.set_attn_processor(processor), or call processor.bind(transformer) "
    "after setting it layer by layer; then call the transformer itself, not its forward() or "
    "one of its blocks."
)


def attend(
    slot: LayerSlot,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    ordered: bool = False,
) -> Tensor:
    """Compute the attention of one layer as decided for its forward pass.

    Args:
        slot: The slot of the layer.
        query, key, value: `[B, S, H, D]`, in the model's order of tokens.
        attention_mask: The mask that Diffusers gives its own processor.
        ordered: Whether queries, keys and values are already in canonical order; see
            `canonical_places`.

    Returns:
        `[B, S, H, D]`, contiguous, in the model's order.

    Raises:
        UnboundProcessorError: No forward pass of the transformer is running.
    """
    if torch.is_grad_enabled() and (
        query.requires_grad or key.requires_grad or value.requires_grad
    ):
        return _attend_with_gradients(slot, query, key, value, attention_mask)
    if torch.compiler.is_compiling():
        out: Tensor = torch.ops.xattn_video.attend_layer(
            query, key, value, attention_mask, slot.handle
        )
        return out
    return _attend_now(slot, query, key, value, attention_mask, ordered)


def canonical_places(slot: LayerSlot) -> Tensor | None:
    """Canonical position of each token, int64 `[S]`, if `attend` takes tokens in canonical order.

    None means that it takes the model's order: ranks trade tokens in that order, and a compiled
    graph must not depend on an order.
    """
    forward = slot.forward
    if torch.compiler.is_compiling() or forward is None or forward.exchange is not None:
        return None
    return forward.layout.inverse


def unbound_error() -> UnboundProcessorError:
    """The error of a layer that runs outside a forward pass of its transformer."""
    return UnboundProcessorError(
        f"this XAttnProcessor is not bound to a running transformer: {HOW_TO_BIND}"
    )


def _attend_with_gradients(
    slot: LayerSlot, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None
) -> Tensor:
    """Attend like the stock processor. Checkpointing also calls this after the forward pass."""
    forward = slot.forward
    slot.state = "dense"
    out: Tensor = dispatch_attention_fn(
        query,
        key,
        value,
        attn_mask=attention_mask,
        backend=None if forward is None else forward.dense_backend,
    )
    return out


def _attend_now(
    slot: LayerSlot,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    ordered: bool = False,
) -> Tensor:
    forward = slot.forward
    if forward is None:
        raise unbound_error()
    if forward.decision.reason == "gradients":
        return _attend_with_gradients(slot, query, key, value, attention_mask)
    # Under autocast the normalised queries and keys are float32, but the values are not.
    query, key = query.to(value.dtype), key.to(value.dtype)
    layout, exchange = forward.layout, forward.exchange
    if exchange is not None:
        if forward.kept is None:
            # Otherwise heads stay on their ranks, with what the layers keep between steps.
            exchange = exchange.ordered(slot.head_order)
        query, key, value = exchange.to_heads(query, key, value)
    if layout.permutation is not None and not ordered:
        query, key, value = map(layout.to_canonical, (query, key, value))
    blocks: BlockLists | None = None
    slot.state = "sparse" if slot.reason is None else "dense"
    if slot.threshold is None:
        out = dense_attention(query, key, value, layout, forward.dense_backend)
    else:
        threshold = slot.threshold if exchange is None else exchange.of_own_heads(slot.threshold)
        out, blocks = _attend_sparsely(slot, forward, query, key, value, threshold)
    if slot.state == "dense":
        blocks = None
    _count_blocks(slot, exchange, blocks)
    for observer in forward.observers:
        observer(AttendedLayer(slot.name, forward, query, key, value, blocks))
    out = layout.from_canonical(out)
    return out.contiguous() if exchange is None else exchange.to_tokens(out)


def _count_blocks(
    slot: LayerSlot, exchange: HeadExchange | None, blocks: BlockLists | None
) -> None:
    """Count the computed blocks over all ranks, and assign heads to ranks by the counts."""
    if blocks is None:
        return
    if exchange is None:
        slot.kept = blocks.counts.sum()
        return
    by_head = exchange.count_heads(blocks.counts.sum((0, 2)))
    slot.kept, slot.imbalance = by_head.sum(), exchange.imbalance(by_head)
    slot.head_order = exchange.balanced_order(by_head)


def _attend_sparsely(
    slot: LayerSlot,
    forward: ForwardPass,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    threshold: Tensor,
) -> tuple[Tensor, BlockLists | None]:
    """A layer's output and its blocks; at a refresh the output is dense.

    Reuses the blocks that the layer kept, and adds the residual if one is kept, until both are
    due. A layer that a cache skipped when they were due makes them at its next run.
    """
    kept, decision = forward.kept, forward.decision
    if kept is None:
        return forward.operator(query, key, value, threshold, forward, None)
    residuals, due = kept.residuals, kept.made.get(slot.name, -1) < decision.due
    slot.refreshed = due and residuals is not None
    if residuals is not None and not due:
        residuals.fetch(slot.name, query.device)
    reused = None if due else kept.blocks(slot.name)
    out, blocks = forward.operator(query, key, value, threshold, forward, reused)
    if reused is None and blocks is not None:
        kept.keep_blocks(slot.name, blocks)
    if residuals is not None and due:
        dense = dense_attention(query, key, value, forward.layout, forward.dense_backend)
        if not decision.last_sparse:
            residuals.keep(slot.name, dense, out)
        out = dense
    elif residuals is not None:
        out = residuals.add(slot.name, out)
    if due:
        kept.made[slot.name] = decision.step
    return out, blocks


def sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    threshold: Tensor,
    forward: ForwardPass,
    blocks: BlockLists | None = None,
) -> tuple[Tensor, BlockLists]:
    """XAttention of one layer in canonical order, `[B, S, H, D]`, and the computed blocks.

    The blocks are chosen unless they are given.
    """
    settings, layout = forward.settings, forward.layout
    longest = forward.longest
    query = query.transpose(1, 2)
    key, value = key[:, :longest].transpose(1, 2), value[:, :longest].transpose(1, 2)
    scale = query.shape[-1] ** -0.5
    video_blocks = layout.num_video_tokens // settings.block_size
    by_count, first_order = settings.density is not None, settings.compensation == "first-order"
    if blocks is None:
        scoring = ScoringInputs(
            query,
            key,
            settings.block_size,
            settings.stride,
            layout.causal,
            forward.device_key_lengths,
            scale,
            settings.scoring_precision,
        )
        scores = compute_scores(scoring)
        if by_count and first_order:
            weights = error_weights(key, value, settings.block_size, video_blocks)
            scores *= weights[:, :, None]
        blocks = select_block_lists(scores, threshold, forward.forced, by_count)
    inputs = AttentionInputs(
        query,
        key,
        value,
        blocks,
        settings.block_size,
        layout.causal,
        forward.device_key_lengths,
        scale,
    )
    assert forward.attend is not None
    out, lse = forward.attend(inputs)
    if lse is not None:
        out = compensate(inputs, out, lse, video_blocks, first_order)
    return out.transpose(1, 2), blocks


def dense_attention(
    query: Tensor, key: Tensor, value: Tensor, layout: TokenLayout, backend: Any
) -> Tensor:
    """Dense attention without a mask, so that flash-class kernels can run.

    Args:
        query, key, value: `[B, S, H, D]` in canonical order.
        layout: The layout of the tokens.
        backend: One of Diffusers' attention backends. None means the active backend, or, if that
            is the default and the GPU is a Hopper, the fastest installed kernel.

    Returns:
        `[B, S, H, D]`.
    """
    kernel = _dense_kernel(query, backend, layout.causal)
    lengths = layout.key_lengths
    if not layout.ragged:
        return kernel(query, key[:, : lengths[0]], value[:, : lengths[0]])
    items = [slice(number, number + 1) for number in range(len(lengths))]
    return torch.cat(
        [
            kernel(query[item], key[item, :length], value[item, :length])
            for item, length in zip(items, lengths, strict=True)
        ]
    )


def _dense_kernel(query: Tensor, backend: Any, causal: bool) -> Callable[..., Tensor]:
    """Diffusers' dispatch, or a faster kernel if the user has not chosen a backend."""
    if causal:
        return partial(dispatch_attention_fn, backend=backend, is_causal=True)
    active, _ = _AttentionBackendRegistry.get_active_backend()
    # Disabling one of PyTorch's kernels counts as the user's choice too.
    unrestricted = torch.backends.cuda.flash_sdp_enabled() and (
        torch.backends.cuda.cudnn_sdp_enabled()
    )
    if backend is None and active == AttentionBackendName.NATIVE and unrestricted:
        kernel = fastest_dense_kernel(query.device, query.dtype, query.shape[-1])
        if kernel is not None:
            return partial(attend_with, kernel)
    return partial(dispatch_attention_fn, backend=backend)


def _attend_layer(
    query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, handle: Tensor
) -> Tensor:
    return _attend_now(LayerSlot.of_handle(handle), query, key, value, attention_mask)


# The schema is written out because its inference from annotations differs between versions of
# torch.
_op = torch.library.custom_op(
    "xattn_video::attend_layer",
    _attend_layer,
    mutates_args=(),
    schema=(
        "(Tensor query, Tensor key, Tensor value, Tensor? attention_mask, Tensor handle) -> Tensor"
    ),
)


@_op.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, *_: object) -> Tensor:
    return value.new_empty(query.shape)
