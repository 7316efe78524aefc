"""Measures how much of the true attention a selection keeps, on sampled rows of blocks."""

import torch
from torch import Tensor

from xattn_video.measure.attention_problems import BLOCK_SIZE, AttentionTensors
from xattn_video.measure.operator_checks import formula_scores, row_weights
from xattn_video.ops.selection import select_blocks

_NUM_ROWS = 8


def selection_quality(
    tensors: AttentionTensors, block_mask: Tensor, stride: int, threshold: float
) -> dict[str, float]:
    """Kept mass and density on some rows of video blocks, all heads.

    Args:
        tensors: Query, key and value.
        block_mask: bool `[B, H, N, N]`, the selection.
        stride: Stride of the scores behind the selection.
        threshold: Threshold of the selection.

    Returns:
        ``kept_mass`` and ``least_kept_mass``: softmax mass of the kept blocks, mean and minimum
        over rows of blocks. ``sampled_density``: density of the selection on these rows.
        ``formula_density`` and ``formula_kept_mass``: density and mass of a selection by float32
        scores. ``oracle_density``: density of a selection by the true mass of every block.
    """
    rows = _spread_rows(tensors)
    heads = list(range(tensors.query.shape[1]))
    mass = torch.cat([_block_mass(tensors, row, heads) for row in rows], dim=2)
    forced = tensors.forced_blocks().to_mask(tensors.query.device)
    forced = None if forced is None else forced[:, :, rows]
    kept = (mass * block_mask[:, :, rows]).sum(dim=-1)
    scores = formula_scores(tensors, rows, heads, stride)
    by_formula = select_blocks(scores, threshold, forced=forced)
    by_mass = select_blocks(mass, threshold, forced=forced)
    return {
        "kept_mass": kept.mean().item(),
        "least_kept_mass": kept.min().item(),
        "sampled_density": _density(block_mask[:, :, rows]),
        "formula_kept_mass": (mass * by_formula).sum(dim=-1).mean().item(),
        "formula_density": _density(by_formula),
        "oracle_density": _density(by_mass),
    }


def _density(block_mask: Tensor) -> float:
    return block_mask.float().mean().item()


def _spread_rows(tensors: AttentionTensors) -> list[int]:
    """Rows of blocks, spread evenly over those without text."""
    num_rows = max(1, (tensors.length - tensors.num_text_tokens) // BLOCK_SIZE)
    return sorted({(2 * i + 1) * num_rows // (2 * _NUM_ROWS) for i in range(_NUM_ROWS)})


def _block_mass(tensors: AttentionTensors, row: int, heads: list[int]) -> Tensor:
    """Softmax mass of every block of a row, averaged over its queries, `[B, H, 1, N]`."""
    weights = row_weights(tensors, row, heads).mean(dim=2, keepdim=True)
    missing = -weights.shape[-1] % BLOCK_SIZE
    padded = torch.nn.functional.pad(weights, (0, missing))
    return padded.unflatten(-1, (-1, BLOCK_SIZE)).sum(dim=-1)
