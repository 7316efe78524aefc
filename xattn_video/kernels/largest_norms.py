"""The norm of each head's longest token, which bounds its products with any other token."""

import torch
import triton
import triton.language as tl
from torch import Tensor

_TOKENS = 64


@triton.jit(do_not_specialize=["H", "S", "num_tiles"])
def _largest_norms_kernel(
    tokens_ptr, lengths_ptr, norms_ptr, stride_b, stride_h, stride_s, H, S, num_tiles,
    HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """The largest norm among TOKENS tokens of one head."""
    batch_head = tl.program_id(1).to(tl.int64)
    b, h = batch_head // H, batch_head % H
    length = S
    if lengths_ptr is not None:
        length = tl.load(lengths_ptr + b)
    rows = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    columns = tl.arange(0, PADDED_DIM)
    # [TOKENS, PADDED_DIM]
    tokens = tl.load(
        tokens_ptr
        + b * stride_b
        + h * stride_h
        + rows.to(tl.int64)[:, None] * stride_s
        + columns[None, :],
        mask=(rows < length)[:, None] & (columns < HEAD_DIM)[None, :],
        other=0.0,
    ).to(tl.float32)
    norm = tl.sqrt(tl.max(tl.sum(tokens * tokens, axis=1)))
    tl.store(norms_ptr + batch_head * num_tiles + tl.program_id(0), norm)


def largest_norms(tokens: Tensor, lengths: Tensor | None) -> Tensor:
    """Norm of each head's longest valid token.

    Args:
        tokens: `[B, H, S, D]`, the last dimension dense.
        lengths: Valid tokens of each item, int32 `[B]` on the same device, or None for all.

    Returns:
        float32 `[B, H]`.
    """
    B, H, S, D = tokens.shape
    num_tiles = triton.cdiv(S, _TOKENS)
    norms = torch.empty(B, H, num_tiles, dtype=torch.float32, device=tokens.device)
    with torch.cuda.device_of(tokens):
        _largest_norms_kernel[(num_tiles, B * H)](
            tokens, lengths, norms, *tokens.stride()[:3], H, S, num_tiles,
            HEAD_DIM=D, PADDED_DIM=triton.next_power_of_2(D), TOKENS=_TOKENS, num_warps=4,
        )  # fmt: skip
    return norms.amax(dim=-1)
