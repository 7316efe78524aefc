"""Attention problems to measure, tensors for them, and thresholds for a density."""

from dataclasses import dataclass

import torch
from torch import Tensor

from xattn_video.ops.blocks import (
    BlockLists,
    ForcedBlocks,
    count_causal_blocks,
    select_block_lists,
)

BLOCK_SIZE = 128
_BISECTIONS = 14


@dataclass(frozen=True, slots=True)
class AttentionProblem:
    """Self-attention over ``length`` tokens; ``key_heads`` may be fewer than ``heads``."""

    name: str
    length: int
    heads: int
    head_dim: int
    batch: int = 1
    key_heads: int | None = None
    causal: bool = False


@dataclass(frozen=True, slots=True)
class AttentionTensors:
    """Query `[B, H, S, D]`, key and value `[B, Hkv, S, D]`, all tokens valid, the text last.

    Attributes:
        name: The name of the problem.
        from_model: Whether a model computed the tensors; otherwise they are random.
        causal: Whether queries see no later keys.
    """

    name: str
    query: Tensor
    key: Tensor
    value: Tensor
    num_text_tokens: int = 0
    from_model: bool = False
    causal: bool = False

    @property
    def length(self) -> int:
        """Number of queries, and of keys."""
        return self.query.shape[2]

    @property
    def dense_flops(self) -> float:
        """Multiplications and additions of both matrix products, over all visible pairs."""
        B, H, S, D = self.query.shape
        return 4.0 * B * H * D * (S * (S + 1) / 2 if self.causal else S**2)

    def forced_blocks(self) -> ForcedBlocks:
        """The forced blocks, those of the text or of causal attention."""
        return ForcedBlocks(
            self.length, self.length, BLOCK_SIZE, self.causal, self.num_text_tokens
        )

    def describe(self) -> dict[str, object]:
        """The columns that all rows of one problem share."""
        B, H, S, D = self.query.shape
        dtype = str(self.query.dtype).removeprefix("torch.")
        return {
            "problem": self.name,
            "inputs": "model" if self.from_model else "random",
            "n": S,
            "batch": B,
            "heads": H,
            "key_heads": self.key.shape[1],
            "head_dim": D,
            "dtype": dtype,
            "causal": self.causal,
        }


def clustered_tensors(
    problem: AttentionProblem, device: torch.device, dtype: torch.dtype, *, focus: float = 0.6
) -> AttentionTensors:
    """Random tensors, stored `[B, S, H, D]` as in Diffusers.

    Runs of 128 tokens share a direction, so that some blocks hold more mass than others; a larger
    ``focus`` concentrates the mass in fewer blocks.
    """
    generator = torch.Generator(device).manual_seed(0)
    key_heads = problem.key_heads or problem.heads
    shape = (problem.batch, problem.length, key_heads, problem.head_dim)
    num_runs = -(-problem.length // BLOCK_SIZE)
    group_size = problem.heads // key_heads

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device=device, dtype=dtype)

    runs = normal(shape[0], num_runs, *shape[2:]) * focus
    shared = runs.repeat_interleave(BLOCK_SIZE, dim=1)[:, : problem.length]
    of_queries = shared.repeat_interleave(group_size, dim=2) if group_size > 1 else shared
    query, key = (
        normal(*part.shape).mul_(0.5).add_(part).transpose(1, 2) for part in (of_queries, shared)
    )
    value = normal(*shape).transpose(1, 2)
    return AttentionTensors(problem.name, query, key, value, causal=problem.causal)


def threshold_for_density(scores: Tensor, density: float, forced: ForcedBlocks) -> float:
    """The threshold whose selection keeps ``density`` of the blocks, as nearly as rows allow."""
    low, high = 0.0, 1.0
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        if density_of(select_block_lists(scores, middle, forced), forced) < density:
            low = middle
        else:
            high = middle
    return high


def density_of(blocks: BlockLists, forced: ForcedBlocks) -> float:
    """Kept blocks over the blocks that dense attention computes."""
    B, H, num_rows, num_columns = blocks.indices.shape
    of_head = num_rows * num_columns
    if forced.causal:
        of_head = count_causal_blocks(forced.query_length, forced.key_length, forced.block_size)
    return blocks.counts.sum().item() / (B * H * of_head)
