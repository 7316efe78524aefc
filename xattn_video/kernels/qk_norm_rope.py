"""The steps of joint text-video attention between the projections and the attention itself.

One pass over memory normalises queries and keys (RMS), applies the rotary embedding to the video
tokens, joins video and text to `[B, S, H, D]` and reorders the tokens. Numbers are rounded to the
inputs' dtype where Diffusers' RMSNorm and apply_rotary_emb round them.

A program holds the rotary embedding of a few tokens and walks their heads.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from xattn_video.kernels.support import INTERPRETING, with_unit_stride

# Tokens per program, for heads of up to 128: each thread loads 16 bytes of bfloat16 at a time.
_TILE, _NUM_WARPS = 4, 2


@triton.jit
def _normalise(ptrs, mask, weight, eps, HEAD_DIM: tl.constexpr):
    """The rows at the pointers, RMS-normalised and weighted; float32 rounded to their dtype."""
    dtype = ptrs.dtype.element_ty
    rows = tl.load(ptrs, mask=mask, other=0.0).to(tl.float32)
    variance = tl.sum(rows * rows, axis=1) / HEAD_DIM
    rows = (rows * tl.rsqrt(variance + eps)[:, None]).to(dtype).to(tl.float32)
    return (rows * weight[None, :]).to(dtype).to(tl.float32)


@triton.jit
def _rotate(rows, cos, sin):
    """Turn neighbouring columns as pairs."""
    TILE: tl.constexpr = rows.shape[0]
    PADDED_DIM: tl.constexpr = rows.shape[1]
    even, odd = tl.split(tl.reshape(rows, [TILE, PADDED_DIM // 2, 2]))
    turned = tl.reshape(tl.join(-odd, even), [TILE, PADDED_DIM])
    return rows * cos + turned * sin


@triton.jit
def _prepare_tokens(
    query_ptr, key_ptr, value_ptr, joint_query_ptr, joint_key_ptr, joint_value_ptr,
    query_weight_ptr, key_weight_ptr, cos_ptr, sin_ptr, place_ptr, first, num_tokens, start,
    stride_s, stride_h, H, eps,
    HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr, TILE: tl.constexpr, ROTATED: tl.constexpr,
):  # fmt: skip
    """All heads of one tile of tokens of the video or of the text, which begins at ``start``."""
    columns = tl.arange(0, PADDED_DIM)
    mask_d = columns < HEAD_DIM
    query_weight = tl.load(query_weight_ptr + columns, mask=mask_d, other=0.0).to(tl.float32)
    key_weight = tl.load(key_weight_ptr + columns, mask=mask_d, other=0.0).to(tl.float32)
    # [TILE, PADDED_DIM]
    tokens = (first + tl.arange(0, TILE)).to(tl.int64)[:, None]
    mask = (tokens < num_tokens) & mask_d[None, :]
    offsets = tokens * stride_s + columns[None, :]
    places = start + tokens
    if place_ptr is not None:
        places = tl.load(place_ptr + places, mask=tokens < num_tokens, other=0)
    joint_offsets = places * (H * HEAD_DIM) + columns[None, :]
    if ROTATED:
        cos = tl.load(cos_ptr + tokens * HEAD_DIM + columns[None, :], mask=mask, other=0.0)
        sin = tl.load(sin_ptr + tokens * HEAD_DIM + columns[None, :], mask=mask, other=0.0)
    for _ in tl.range(0, H):
        query = _normalise(query_ptr + offsets, mask, query_weight, eps, HEAD_DIM)
        key = _normalise(key_ptr + offsets, mask, key_weight, eps, HEAD_DIM)
        if ROTATED:
            query = _rotate(query, cos, sin)
            key = _rotate(key, cos, sin)
        dtype = joint_query_ptr.dtype.element_ty
        tl.store(joint_query_ptr + joint_offsets, query.to(dtype), mask=mask)
        tl.store(joint_key_ptr + joint_offsets, key.to(dtype), mask=mask)
        if value_ptr is not None:
            value = tl.load(value_ptr + offsets, mask=mask, other=0.0)
            tl.store(joint_value_ptr + joint_offsets, value, mask=mask)
        offsets += stride_h
        joint_offsets += HEAD_DIM


@triton.jit(do_not_specialize=["num_video", "num_text", "H"])
def _qk_norm_rope_kernel(
    query_ptr, key_ptr, value_ptr, text_query_ptr, text_key_ptr, text_value_ptr,
    joint_query_ptr, joint_key_ptr, joint_value_ptr,
    query_weight_ptr, key_weight_ptr, text_query_weight_ptr, text_key_weight_ptr,
    cos_ptr, sin_ptr, place_ptr,
    stride_b, stride_s, stride_h, text_stride_b, text_stride_s, text_stride_h,
    num_video, num_text, H, eps,
    HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """One tile of tokens of one item; the tiles of the video come first."""
    b = tl.program_id(1).to(tl.int64)
    joint = b * (num_video + num_text) * (H * HEAD_DIM)
    tile = tl.program_id(0)
    video_tiles = tl.cdiv(num_video, TILE)
    joins_values: tl.constexpr = value_ptr is not None
    if tile < video_tiles:
        _prepare_tokens(
            query_ptr + b * stride_b, key_ptr + b * stride_b,
            value_ptr + b * stride_b if joins_values else None,
            joint_query_ptr + joint, joint_key_ptr + joint,
            joint_value_ptr + joint if joins_values else None,
            query_weight_ptr, key_weight_ptr, cos_ptr, sin_ptr, place_ptr,
            tile * TILE, num_video, 0, stride_s, stride_h, H, eps,
            HEAD_DIM, PADDED_DIM, TILE, True,
        )  # fmt: skip
    else:
        _prepare_tokens(
            text_query_ptr + b * text_stride_b, text_key_ptr + b * text_stride_b,
            text_value_ptr + b * text_stride_b if joins_values else None,
            joint_query_ptr + joint, joint_key_ptr + joint,
            joint_value_ptr + joint if joins_values else None,
            text_query_weight_ptr, text_key_weight_ptr, None, None, place_ptr,
            (tile - video_tiles) * TILE, num_text, num_video, text_stride_s, text_stride_h, H, eps,
            HEAD_DIM, PADDED_DIM, TILE, False,
        )  # fmt: skip


def _alike(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The tensors if they share their strides and the last dimension is dense, else copies."""
    tensors = [with_unit_stride(tensor) for tensor in tensors]
    if len({tensor.stride() for tensor in tensors}) > 1:
        tensors = [tensor.contiguous() for tensor in tensors]
    return tensors


def qk_norm_rope(
    video: Sequence[Tensor],
    text: Sequence[Tensor],
    weights: Sequence[Tensor],
    rotary_emb: tuple[Tensor, Tensor],
    eps: float,
    places: Tensor | None = None,
) -> list[Tensor]:
    """Normalise queries and keys, rotate those of the video and join them with those of the text.

    Args:
        video: Projected queries, keys and, unless they are already joined, values: each
            `[B, Sv, H, D]`, of one dtype, any strides.
        text: The same for the text, `[B, St, H, D]`.
        weights: Weights of the RMS norms: the video's queries and keys, then the text's; each
            `[D]`, of the same dtype.
        rotary_emb: Cosines and sines, float32 `[Sv, D]`; columns 2i and 2i + 1 are a pair.
        eps: Added to the mean square.
        places: int64 `[Sv + St]`: the place of each token in the result, the video's first. None
            keeps their order.

    Returns:
        Queries, keys and, if given, values: each `[B, Sv + St, H, D]`, contiguous.
    """
    B, num_video, H, D = video[0].shape
    num_text = text[0].shape[1]
    cos, sin = (part.contiguous() for part in rotary_emb)
    assert len(video) == len(text) in (2, 3), (len(video), len(text))
    assert all(part.shape == (B, num_video, H, D) for part in video), [p.shape for p in video]
    assert all(part.shape == (B, num_text, H, D) for part in text), [p.shape for p in text]
    assert cos.shape == sin.shape == (num_video, D), (cos.shape, sin.shape, video[0].shape)
    video, text = _alike(video), _alike(text)
    joint = [part.new_empty(B, num_video + num_text, H, D) for part in video]
    no_values = [None] * (3 - len(video))
    padded_dim = triton.next_power_of_2(D)
    tile = 64 if INTERPRETING else max(_TILE * 128 // padded_dim, 1)
    tiles = triton.cdiv(num_video, tile) + triton.cdiv(num_text, tile)
    with torch.cuda.device_of(video[0]):
        _qk_norm_rope_kernel[(tiles, B)](
            *video, *no_values, *text, *no_values, *joint, *no_values,
            *(weight.contiguous() for weight in weights), cos, sin, places,
            *video[0].stride()[:3], *text[0].stride()[:3], num_video, num_text, H, eps,
            HEAD_DIM=D, PADDED_DIM=padded_dim, TILE=tile, num_warps=_NUM_WARPS,
        )  # fmt: skip
    return joint
