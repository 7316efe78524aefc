"""HunyuanVideo's attention of a layer, in the numbered steps of Diffusers' processor.

`prepare_eagerly` takes steps 2 to 4 one by one. `prepare_fused` computes the same with one kernel
if `can_fuse` allows it. Both call projections as modules, so adapters and quantised layers work
as usual.
"""

from collections.abc import Sequence

import torch
from diffusers.models.attention_processor import Attention
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.normalization import RMSNorm
from torch import Tensor, nn

from xattn_video.kernels.support import DTYPES, LARGEST_HEAD_DIM
from xattn_video.processors import engine
from xattn_video.processors.recorder import LayerSlot

RotaryEmb = tuple[Tensor, Tensor]
Heads = tuple[Tensor, Tensor, Tensor]


def attention(
    attn: Attention,
    slot: LayerSlot,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    image_rotary_emb: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Diffusers' HunyuanVideoAttnProcessor2_0, except for step 5 and, on a GPU, steps 2 to 4."""
    num_text_tokens = encoder_hidden_states.shape[1]
    if attn.add_q_proj is None:
        hidden_states = join(hidden_states, encoder_hidden_states)

    # 1. QKV projections
    query = attn.to_q(hidden_states)
    key = attn.to_k(hidden_states)
    value = attn.to_v(hidden_states)

    query = query.unflatten(2, (attn.heads, -1))
    key = key.unflatten(2, (attn.heads, -1))
    value = value.unflatten(2, (attn.heads, -1))

    # 2. to 4. QK normalization, rotary embedding of the video, QKV projections of the text
    heads = (query, key, value)
    ordered = False
    if (
        slot.fuses
        and image_rotary_emb is not None
        and can_fuse(attn, heads, encoder_hidden_states, image_rotary_emb)
    ):
        places = engine.canonical_places(slot)
        heads = prepare_fused(attn, heads, encoder_hidden_states, image_rotary_emb, places)
        ordered = places is not None
    else:
        heads = prepare_eagerly(attn, heads, encoder_hidden_states, image_rotary_emb)
    query, key, value = heads

    # 5. Attention
    hidden_states = engine.attend(slot, query, key, value, attention_mask, ordered)
    hidden_states = hidden_states.flatten(2, 3)
    hidden_states = hidden_states.to(query.dtype)

    # 6. Output projection
    hidden_states, encoder_hidden_states = (
        hidden_states[:, :-num_text_tokens],
        hidden_states[:, -num_text_tokens:],
    )

    if getattr(attn, "to_out", None) is not None:
        hidden_states = attn.to_out[0](hidden_states)
        hidden_states = attn.to_out[1](hidden_states)

    if getattr(attn, "to_add_out", None) is not None:
        encoder_hidden_states = attn.to_add_out(encoder_hidden_states)

    return hidden_states, encoder_hidden_states


def join(video: Tensor, text: Tensor) -> Tensor:
    """Join video and text in one tensor, `[B, Sv + St, C]`.

    Single-stream blocks have just cut both from one tensor, which is then reused without a copy.
    A compiled graph avoids the copy by itself.
    """
    if (
        not torch.compiler.is_compiling()
        and not torch.is_grad_enabled()
        and video._base is not None
        and video._base is text._base
        and video.dtype == text.dtype
        and video.stride() == text.stride()
        and text.storage_offset() == video.storage_offset() + video.shape[1] * video.stride(1)
    ):
        B, num_video, C = video.shape
        return video.as_strided((B, num_video + text.shape[1], C), video.stride())
    return torch.cat([video, text], dim=1)


def can_fuse(
    attn: Attention, video: Heads, encoder_hidden_states: Tensor, image_rotary_emb: RotaryEmb
) -> bool:
    """Whether the fused kernel computes the same as the layer's own modules.

    Args:
        attn: The attention module of the layer.
        video: As in `prepare_eagerly`.
        encoder_hidden_states: As in `prepare_eagerly`.
        image_rotary_emb: As in `prepare_eagerly`.
    """
    query = video[0]
    head_dim = query.shape[-1]
    num_video_tokens = query.shape[1]
    if attn.add_q_proj is None:
        num_video_tokens -= encoder_hidden_states.shape[1]
    norms = _norms(attn)
    # The kernel has no backward.
    needs_grad = torch.is_grad_enabled() and any(
        tensor.requires_grad for tensor in (*video, encoder_hidden_states, *attn.parameters())
    )
    return (
        not needs_grad
        and query.dtype in DTYPES
        and head_dim % 16 == 0
        and head_dim <= LARGEST_HEAD_DIM
        and all(tensor.shape == query.shape and tensor.dtype == query.dtype for tensor in video)
        and all(_is_plain(norm, query) and norm.eps == norms[0].eps for norm in norms)
        and all(
            part.dtype == torch.float32
            and part.device == query.device
            and part.shape == (num_video_tokens, head_dim)
            for part in image_rotary_emb
        )
    )


def prepare_fused(
    attn: Attention,
    video: Heads,
    encoder_hidden_states: Tensor,
    image_rotary_emb: RotaryEmb,
    places: Tensor | None = None,
) -> Heads:
    """Compute the result of `prepare_eagerly` with one kernel; only if `can_fuse` allows it.

    If ``places`` is given, int64 `[Sv + St]`, token t is written to position ``places[t]``.
    """
    norms = _norms(attn)
    weights = [norm.weight for norm in norms]
    if attn.add_q_proj is not None:
        text = _project_text(attn, encoder_hidden_states)
        query, key, value = torch.ops.xattn_video.qk_norm_rope(
            video, text, weights, *image_rotary_emb, norms[0].eps, places
        )
        return query, key, value
    num_text_tokens = encoder_hidden_states.shape[1]
    # Values are already joined, and need the kernel only to be reordered.
    moved = video[:2] if places is None else video
    query, key, *values = torch.ops.xattn_video.qk_norm_rope(
        [tokens[:, :-num_text_tokens] for tokens in moved],
        [tokens[:, -num_text_tokens:] for tokens in moved],
        [*weights, *weights],
        *image_rotary_emb,
        norms[0].eps,
        places,
    )
    return query, key, values[0] if values else video[2]


def prepare_eagerly(
    attn: Attention,
    video: Heads,
    encoder_hidden_states: Tensor,
    image_rotary_emb: RotaryEmb | None,
) -> Heads:
    """Normalise, rotate the video and join it with the text.

    Args:
        attn: The attention module of the layer.
        video: Projected queries, keys and values, `[B, S, H, D]`: of the video if the layer has
            projections for the text, else of video and text.
        encoder_hidden_states: The text, `[B, St, C]`.
        image_rotary_emb: Cosines and sines for the video tokens, `[Sv, D]`, or None.

    Returns:
        Queries, keys and values, `[B, Sv + St, H, D]`.
    """
    query, key, value = video

    # 2. QK normalization
    if attn.norm_q is not None:
        query = attn.norm_q(query)
    if attn.norm_k is not None:
        key = attn.norm_k(key)

    # 3. Rotational positional embeddings applied to latent stream
    if image_rotary_emb is not None:
        if attn.add_q_proj is None:
            num_text_tokens = encoder_hidden_states.shape[1]
            query = _rotate_video(query, image_rotary_emb, num_text_tokens)
            key = _rotate_video(key, image_rotary_emb, num_text_tokens)
        else:
            query = apply_rotary_emb(query, image_rotary_emb, sequence_dim=1)
            key = apply_rotary_emb(key, image_rotary_emb, sequence_dim=1)

    # 4. Encoder condition QKV projection and normalization
    if attn.add_q_proj is not None:
        encoder_query, encoder_key, encoder_value = _project_text(attn, encoder_hidden_states)

        if attn.norm_added_q is not None:
            encoder_query = attn.norm_added_q(encoder_query)
        if attn.norm_added_k is not None:
            encoder_key = attn.norm_added_k(encoder_key)

        query = torch.cat([query, encoder_query], dim=1)
        key = torch.cat([key, encoder_key], dim=1)
        value = torch.cat([value, encoder_value], dim=1)

    return query, key, value


def _project_text(attn: Attention, encoder_hidden_states: Tensor) -> Heads:
    """Queries, keys and values of the text, `[B, St, H, D]`."""
    encoder_query = attn.add_q_proj(encoder_hidden_states)
    encoder_key = attn.add_k_proj(encoder_hidden_states)
    encoder_value = attn.add_v_proj(encoder_hidden_states)

    return (
        encoder_query.unflatten(2, (attn.heads, -1)),
        encoder_key.unflatten(2, (attn.heads, -1)),
        encoder_value.unflatten(2, (attn.heads, -1)),
    )


def _rotate_video(tokens: Tensor, image_rotary_emb: RotaryEmb, num_text_tokens: int) -> Tensor:
    """Rotary embedding on all but the text tokens, which come last, `[B, S, H, D]`."""
    video, text = tokens[:, :-num_text_tokens], tokens[:, -num_text_tokens:]
    return torch.cat([apply_rotary_emb(video, image_rotary_emb, sequence_dim=1), text], dim=1)


def _norms(attn: Attention) -> list[nn.Module]:
    """The norms of the layer's queries and keys, then those of the text if it has its own."""
    own_text = attn.add_q_proj is not None
    return [attn.norm_q, attn.norm_k] + [attn.norm_added_q, attn.norm_added_k] * own_text


def _is_plain(norm: nn.Module, rows: Tensor) -> bool:
    """Whether the norm is a plain weight with the device and dtype of the rows.

    Code that replaces ``forward`` or registers hooks, such as offloading, may move the weight
    when the module is called. The kernel does not do that.
    """
    return (
        type(norm) is RMSNorm
        and "forward" not in vars(norm)
        and not norm._forward_pre_hooks
        and not norm._forward_hooks
        and norm.bias is None
        and norm.weight is not None
        and norm.weight.shape == rows.shape[-1:]
        and norm.weight.dtype == rows.dtype
        and norm.weight.device == rows.device
    )


def _qk_norm_rope(
    video: Sequence[Tensor],
    text: Sequence[Tensor],
    weights: Sequence[Tensor],
    cos: Tensor,
    sin: Tensor,
    eps: float,
    places: Tensor | None,
) -> list[Tensor]:
    # Imported here because Triton may be missing.
    from xattn_video.kernels.qk_norm_rope import qk_norm_rope

    return qk_norm_rope(video, text, weights, (cos, sin), eps, places)


# Opaque to torch.compile, so that a compiled transformer keeps whole graphs.
_op = torch.library.custom_op(
    "xattn_video::qk_norm_rope",
    _qk_norm_rope,
    mutates_args=(),
    schema=(
        "(Tensor[] video, Tensor[] text, Tensor[] weights, Tensor cos, Tensor sin, float eps, "
        "Tensor? places) -> Tensor[]"
    ),
)


@_op.register_fake
def _(video: Sequence[Tensor], text: Sequence[Tensor], *_: object) -> list[Tensor]:
    B, num_video, H, D = video[0].shape
    joint = (B, num_video + text[0].shape[1], H, D)
    return [tokens.new_empty(joint) for tokens in video]
