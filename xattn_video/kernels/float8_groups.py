"""Rounds groups of tokens to 8 bits (float8 e4m3), with one scale per group."""

import torch
import triton
import triton.language as tl
from torch import Tensor

# The largest e4m3 number.
_LARGEST = tl.constexpr(448.0)
_TOKENS = 64


@triton.jit(do_not_specialize=["H", "S", "G"])
def _quantize_groups_kernel(
    tokens_ptr, shift_ptr, lengths_ptr, quantized_ptr, scales_ptr,
    stride_b, stride_h, stride_s, H, S, G,
    HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr, STRIDE: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """TOKENS tokens of one head: shift them, scale each group to the range of e4m3, round."""
    GROUPS: tl.constexpr = TOKENS // STRIDE
    batch_head = tl.program_id(1).to(tl.int64)
    b, h = batch_head // H, batch_head % H
    length = S
    if lengths_ptr is not None:
        length = tl.load(lengths_ptr + b)
    offsets_s = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    columns = tl.arange(0, PADDED_DIM)
    mask_d = (columns < HEAD_DIM)[None, :]
    # A group cut by the end of the tokens repeats the last token.
    rows = tl.minimum(offsets_s, length - 1).to(tl.int64)
    tokens_ptr += b * stride_b + h * stride_h
    # [TOKENS, PADDED_DIM]
    tokens = tl.load(
        tokens_ptr + rows[:, None] * stride_s + columns[None, :], mask=mask_d, other=0
    )
    tokens = tokens.to(tl.float32)
    if shift_ptr is not None:
        shift = tl.load(
            shift_ptr + batch_head * HEAD_DIM + columns, mask=columns < HEAD_DIM, other=0
        )
        tokens -= shift[None, :]
    grouped = tl.reshape(tokens, [GROUPS, STRIDE * PADDED_DIM])
    largest = tl.max(tl.abs(grouped), axis=1)
    scales = tl.where(largest > 0, largest / _LARGEST, 1.0)
    quantized = tl.reshape(grouped / scales[:, None], [TOKENS, PADDED_DIM])
    tl.store(
        quantized_ptr
        + (batch_head * G * STRIDE + offsets_s)[:, None] * HEAD_DIM
        + columns[None, :],
        quantized.to(tl.float8e4nv),
        mask=(offsets_s < G * STRIDE)[:, None] & mask_d,
    )
    groups = tl.program_id(0) * GROUPS + tl.arange(0, GROUPS)
    tl.store(scales_ptr + batch_head * G + groups, scales, mask=groups < G)


def quantize_groups(
    tokens: Tensor, stride: int, *, lengths: Tensor | None = None, shift: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Round tokens to 8 bits, with one scale for each group of ``stride`` of them.

    Args:
        tokens: `[B, H, S, D]`, the last dimension dense.
        stride: Tokens in a group, a power of two.
        lengths: Valid tokens of each item, int32 `[B]` on the same device, or None for all.
        shift: float32 `[B, H, D]`, subtracted from every token first, or None.

    Returns:
        float8_e4m3fn `[B, H, G * stride, D]`, contiguous, G = ceil(S / stride), where a cut group
        repeats its last valid token; and float32 `[B, H, G]`, the scales: 8-bit number x scale is
        the shifted token.
    """
    B, H, S, D = tokens.shape
    G = triton.cdiv(S, stride)
    quantized = torch.empty(B, H, G * stride, D, dtype=torch.float8_e4m3fn, device=tokens.device)
    scales = torch.empty(B, H, G, dtype=torch.float32, device=tokens.device)
    tile = max(_TOKENS, stride)
    with torch.cuda.device_of(tokens):
        _quantize_groups_kernel[(triton.cdiv(G * stride, tile), B * H)](
            tokens, None if shift is None else shift.contiguous(), lengths, quantized, scales,
            *tokens.stride()[:3], H, S, G,
            HEAD_DIM=D, PADDED_DIM=triton.next_power_of_2(D), STRIDE=stride, TOKENS=tile,
            num_warps=4,
        )  # fmt: skip
    return quantized, scales


def sampled_mean(tokens: Tensor, every: int, lengths: Tensor | None) -> Tensor:
    """Mean of each ``every``-th valid token, float32 `[B, H, D]`."""
    sample = tokens[:, :, ::every].float()
    if lengths is None:
        return sample.mean(dim=2)
    positions = torch.arange(sample.shape[2], device=tokens.device) * every
    valid = (positions < lengths[:, None])[:, None, :, None]
    return sample.where(valid, 0.0).sum(dim=2) / valid.sum(dim=2)
