"""Approximates the skipped blocks by their mean keys and values, and by a linear term.

docs/fewer-blocks.md states the formulas.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from xattn_video.kernels.support import kernel_unsupported_reasons
from xattn_video.ops.problem import AttentionInputs

# Heads computed at once on a GPU. At 119,000 tokens the covariances of one take 60 MiB.
_HEADS_AT_ONCE = 6


def compensate(
    inputs: AttentionInputs, out: Tensor, lse: Tensor, num_blocks: int, first_order: bool
) -> Tensor:
    """Add the skipped blocks among the first ``num_blocks``, each approximated by its means.

    Args:
        inputs: The checked inputs of the attention, not causal, with a key head for each query
            head.
        out: Output of the block-sparse attention, `[B, H, Sq, D]`; it is overwritten.
        lse: Log-sum-exp of that attention, float32 `[B, H, Sq]`.
        num_blocks: The number of key blocks that may be replaced; all their keys are valid.
        first_order: Whether to add the linear term.

    Returns:
        ``out``.
    """
    if not num_blocks:
        return out
    mask = inputs.blocks.to_mask()
    for heads in _head_groups(inputs.query):
        _compensate_heads(inputs, heads, mask, out, lse, num_blocks, first_order)
    return out


def error_weights(key: Tensor, value: Tensor, block_size: int, num_blocks: int) -> Tensor:
    """Norm of each block's covariance, float32 `[B, H, Nk]`: how wrong its mean may be.

    Blocks from ``num_blocks`` on are computed anyway and have weight 1.
    """
    weights = key.new_ones(*key.shape[:2], -(-key.shape[2] // block_size), dtype=torch.float32)
    if not num_blocks:
        return weights
    if _kernel_runs(key, block_size):
        from xattn_video.kernels.block_moments import covariance_norms

        norms = covariance_norms(key, value, block_size, num_blocks)
    else:
        _, _, covariances = _moments(key, value, block_size, num_blocks)
        exact = torch.promote_types(covariances.dtype, torch.float32)
        norms = torch.linalg.vector_norm(covariances, dim=(-2, -1), dtype=exact).float()
    weights[..., :num_blocks] = norms
    return weights


def _head_groups(tokens: Tensor) -> list[slice]:
    """Slices that split the heads of `[B, H, S, D]` into groups; one group on a CPU."""
    heads = tokens.shape[1]
    at_once = _HEADS_AT_ONCE if tokens.is_cuda else heads
    return [slice(first, first + at_once) for first in range(0, heads, at_once)]


@dataclass(frozen=True, slots=True)
class _Skipped:
    """What approximates the skipped blocks among the first N, for some heads.

    mean_keys and mean_values are `[B, H, N, D]`; kept is bool `[B, H, Nq, N]`. slopes are
    `[B, H, Nq, D, D]` or None; query x slope x scale is added to the mean value.
    """

    mean_keys: Tensor
    mean_values: Tensor
    slopes: Tensor | None
    kept: Tensor


def _compensate_heads(
    inputs: AttentionInputs,
    heads: slice,
    block_mask: Tensor,
    out: Tensor,
    lse: Tensor,
    num_blocks: int,
    first_order: bool,
) -> None:
    """`compensate` for some heads, in place."""
    query, key, value = (one[:, heads] for one in (inputs.query, inputs.key, inputs.value))
    out, lse = out[:, heads], lse[:, heads]
    kept = block_mask[:, heads, :, :num_blocks]
    block_size, scale = inputs.block_size, inputs.scale
    runs_kernels = _kernel_runs(query, block_size)
    moments, softmax = _moments, _softmax_of_skipped
    if runs_kernels:
        # Imported here so that compensation works where Triton is missing.
        from xattn_video.kernels.block_moments import block_moments as moments
        from xattn_video.kernels.merge_skipped import merge_skipped
        from xattn_video.kernels.merge_skipped import softmax_of_skipped as softmax
    mean_keys, mean_values, covariances = moments(key, value, block_size, num_blocks)
    slopes = None
    if first_order:
        products = _block_means(query, block_size) @ mean_keys.mT
        weights = softmax(products, kept, scale)
        slopes = (weights @ covariances.flatten(-2)).unflatten(-1, covariances.shape[-2:])
    if not runs_kernels:
        skipped = _Skipped(mean_keys, mean_values, slopes, kept)
        _merge(query, skipped, out, lse, block_size, scale)
        return
    merge_skipped(
        query,
        mean_keys,
        mean_values,
        slopes,
        kept,
        lse,
        out,
        block_size=block_size,
        scale=scale,
    )


def _kernel_runs(tokens: Tensor, block_size: int) -> bool:
    """Whether the Triton kernels can run; the result is the same without them."""
    return not kernel_unsupported_reasons(
        tokens.device, tokens.dtype, tokens.shape[-1], block_size
    )


def _moments(
    key: Tensor, value: Tensor, block_size: int, num_blocks: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean keys and values `[B, H, N, D]` of the first blocks, their covariance `[B, H, N, D, D]`.

    The covariance of a block is mean((key - mean key) (value)^T).
    """
    length = num_blocks * block_size
    keys, values = (one[:, :, :length].unflatten(2, (-1, block_size)) for one in (key, value))
    mean_keys, mean_values = keys.mean(dim=3), values.mean(dim=3)
    # Divided before they are summed: a float16 has no room for the sum.
    centred = (keys - mean_keys[..., None, :]).div_(block_size)
    return mean_keys, mean_values, centred.mT @ values


def _block_means(tokens: Tensor, block_size: int) -> Tensor:
    """The mean of every block, `[B, H, Nq, D]`; the last one may be shorter."""
    whole = tokens.shape[2] // block_size
    means = tokens[:, :, : whole * block_size].unflatten(2, (-1, block_size)).mean(dim=3)
    rest = tokens[:, :, whole * block_size :]
    return torch.cat([means, rest.mean(dim=2, keepdim=True)], dim=2) if rest.shape[2] else means


def _softmax_of_skipped(products: Tensor, kept: Tensor, scale: float) -> Tensor:
    """Softmax over the last dimension, in the input's dtype; 0 where a row skips nothing."""
    scaled = (products.float() * scale).masked_fill_(kept, -torch.inf)
    weights = scaled.softmax(dim=-1).masked_fill_(kept.all(dim=-1, keepdim=True), 0)
    return weights.to(products.dtype)


def _merge(
    query: Tensor, skipped: _Skipped, out: Tensor, lse: Tensor, block_size: int, scale: float
) -> None:
    """`kernels.merge_skipped` in plain torch."""
    length = query.shape[2]
    kept = skipped.kept.repeat_interleave(block_size, dim=2)[:, :, :length]
    products = query @ skipped.mean_keys.mT
    mean = (_softmax_of_skipped(products, kept, scale) @ skipped.mean_values).float()
    if skipped.slopes is not None:
        rows = F.pad(query, (0, 0, 0, -length % block_size)).unflatten(2, (-1, block_size))
        mean += (rows @ skipped.slopes).flatten(2, 3)[:, :, :length].float() * scale
    scaled = (products.float() * scale).masked_fill_(kept, -torch.inf)
    skipped_lse = scaled.logsumexp(dim=-1) + math.log(block_size)
    # The skipped blocks' share of the whole mass.
    share = (skipped_lse - lse).sigmoid().masked_fill(kept.all(dim=-1), 0)
    out.copy_(out.float().lerp(mean, share[..., None]))
