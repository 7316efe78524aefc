"""Checks the results to be timed against the formula, on a few rows of blocks."""

import torch
import torch.nn.functional as F
from torch import Tensor

from xattn_video.errors import XAttentionError
from xattn_video.measure.attention_problems import BLOCK_SIZE, AttentionTensors
from xattn_video.ops.scoring import ScoringInputs, torch_block_scores

# Relative to the norm. bfloat16 errors are four times smaller; other blocks give far larger ones.
_LARGEST_ERROR = 0.02
# Relative to the largest score. 8-bit operands err by up to 0.06, another stride by far more.
_LARGEST_SCORE_ERROR = 0.1
# Relative to a row's mass.
_LARGEST_SELECTION_ERROR = 0.05


class WrongResultError(XAttentionError):
    """The result to be timed differs from the formula."""


def check_attention(
    out: Tensor,
    tensors: AttentionTensors,
    block_mask: Tensor | None = None,
    num_keys: int | None = None,
) -> float:
    """Relative error of attention on sampled rows, against float32 in plain torch.

    Args:
        out: `[B, H, S, D]`.
        tensors: The inputs of the attention.
        block_mask: bool `[B, H, N, N]`; None for dense attention.
        num_keys: Number of first keys that are valid; None means all.

    Raises:
        WrongResultError: The error is too large, or not a number.
    """
    heads = _sampled_heads(tensors)
    found, expected = [], []
    for row in sampled_rows(tensors):
        weights = row_weights(tensors, row, heads, num_keys)
        if block_mask is not None:
            kept = block_mask[:, heads, row, None].repeat_interleave(BLOCK_SIZE, dim=-1)
            weights = weights * kept[..., : weights.shape[-1]]
            weights = weights / weights.sum(dim=-1, keepdim=True)
        value = tensors.value[:, key_heads(tensors, heads), : weights.shape[-1]]
        expected.append(weights @ value.float())
        found.append(out[:, heads, row * BLOCK_SIZE : (row + 1) * BLOCK_SIZE].float())
    reference = torch.cat(expected, 2)
    return _checked(
        (torch.cat(found, 2) - reference).norm() / reference.norm(), "attention", _LARGEST_ERROR
    )


def check_scores(scores: Tensor, tensors: AttentionTensors, stride: int) -> float:
    """Largest error of block scores on sampled rows, relative to the largest score.

    Raises:
        WrongResultError: The error is too large, or not a number.
    """
    heads = _sampled_heads(tensors)
    rows = sampled_rows(tensors)
    expected = formula_scores(tensors, rows, heads, stride)
    difference = scores[:, heads][:, :, rows] - expected
    error = difference.abs().max() / expected.max()
    return _checked(error, "scores", _LARGEST_SCORE_ERROR)


def check_selection(
    block_mask: Tensor, scores: Tensor, threshold: float, forced: Tensor | None
) -> float:
    """Largest share of a row's mass that a selection lacks or keeps unnecessarily.

    Raises:
        WrongResultError: The share is too large, or not a number.
    """
    total = scores.sum(dim=-1)
    kept = torch.where(block_mask, scores, 0.0).sum(dim=-1)
    missing = (threshold * total - kept).clamp(min=0)
    chosen = block_mask if forced is None else block_mask & ~forced
    # Without its smallest chosen block, a row must not reach the threshold.
    smallest = scores.masked_fill(~chosen, float("inf")).amin(dim=-1)
    alone = block_mask.sum(dim=-1) == 1
    surplus = (kept - smallest - threshold * total).clamp(min=0).masked_fill(alone, 0.0)
    return _checked(
        (torch.maximum(missing, surplus) / total).max(), "selection", _LARGEST_SELECTION_ERROR
    )


def formula_scores(
    tensors: AttentionTensors, rows: list[int], heads: list[int], stride: int
) -> Tensor:
    """Some rows of the block scores, computed in float32, `[B, heads, rows, N]`."""
    key = tensors.key[:, key_heads(tensors, heads)].float()
    num_blocks = -(-tensors.length // BLOCK_SIZE)
    scores = []
    for row in rows:
        stop = min((row + 1) * BLOCK_SIZE, tensors.length)
        # Keys after the row are cut off, because the diagonal is aligned at the end of the keys.
        of_row = torch_block_scores(
            ScoringInputs(
                tensors.query[:, heads, row * BLOCK_SIZE : stop].float(),
                key[:, :, :stop] if tensors.causal else key,
                BLOCK_SIZE,
                stride,
                causal=tensors.causal,
                key_lengths=None,
                scale=key.shape[-1] ** -0.5,
            )
        )
        scores.append(F.pad(of_row, (0, num_blocks - of_row.shape[-1])))
    return torch.cat(scores, dim=2)


def row_weights(
    tensors: AttentionTensors, row: int, heads: list[int], num_keys: int | None = None
) -> Tensor:
    """Softmax of one row of blocks over all valid keys, float32 `[B, heads, tokens, keys]`."""
    start = row * BLOCK_SIZE
    query = tensors.query[:, heads, start : start + BLOCK_SIZE].float()
    key = tensors.key[:, key_heads(tensors, heads), :num_keys].float()
    products = query @ key.mT * query.shape[-1] ** -0.5
    if tensors.causal:
        later = torch.ones(products.shape[-2:], dtype=torch.bool, device=key.device)
        products.masked_fill_(later.triu(start + 1), float("-inf"))
    return products.softmax(dim=-1)


def key_heads(tensors: AttentionTensors, heads: list[int]) -> list[int]:
    """The key heads of some query heads."""
    group_size = tensors.query.shape[1] // tensors.key.shape[1]
    return [head // group_size for head in heads]


def sampled_rows(tensors: AttentionTensors) -> list[int]:
    """The first, the middle and the last row of blocks."""
    last = (tensors.length - 1) // BLOCK_SIZE
    return sorted({0, last // 2, last})


def _sampled_heads(tensors: AttentionTensors) -> list[int]:
    """The first and the last head."""
    return sorted({0, tensors.query.shape[1] - 1})


def _checked(error: Tensor, what: str, largest: float) -> float:
    found = error.item()
    if not found <= largest:
        raise WrongResultError(
            f"{what} differ from the formula by {found:.2g}, at most {largest} is allowed; "
            "nothing is timed."
        )
    return found
