"""What is measured: attention problems, tensors for them, and thresholds for a density."""

from dataclasses import dataclass

import torch
from torch import Tensor

from xattn_video.ops.blocks import BlockLists, ForcedBlocks
from xattn_video.ops.selection import select_block_lists

BLOCK_SIZE = 128
_BISECTIONS = 14


@dataclass(frozen=True, slots=True)
class AttentionProblem:
    """Self-attention over ``length`` tokens."""

    name: str
    length: int
    heads: int
    head_dim: int
    batch: int = 1


@dataclass(frozen=True, slots=True)
class AttentionTensors:
    """Query, key and value `[B, H, S, D]`, all tokens valid, the text last.

    Attributes:
        name: Of the problem they belong to.
        from_model: Whether a model computed them; random otherwise.
    """

    name: str
    query: Tensor
    key: Tensor
    value: Tensor
    num_text_tokens: int = 0
    from_model: bool = False

    @property
    def length(self) -> int:
        """Tokens, of queries and of keys."""
        return self.query.shape[2]

    @property
    def dense_flops(self) -> float:
        """Multiplications and additions of both matrix products, every pair of tokens counted."""
        B, H, S, D = self.query.shape
        return 4.0 * B * H * S**2 * D

    def forced_blocks(self) -> ForcedBlocks:
        """The blocks of the text, which are computed at any score."""
        return ForcedBlocks(
            self.length, self.length, BLOCK_SIZE, num_text_tokens=self.num_text_tokens
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
            "head_dim": D,
            "dtype": dtype,
        }


def clustered_tensors(
    problem: AttentionProblem, device: torch.device, dtype: torch.dtype, *, focus: float = 0.6
) -> AttentionTensors:
    """Random tensors, stored `[B, S, H, D]` as Diffusers hands them over.

    Runs of 128 tokens share a direction, so that some blocks hold more mass than others; a larger
    ``focus`` gives fewer blocks more of it.
    """
    generator = torch.Generator(device).manual_seed(0)
    shape = (problem.batch, problem.length, problem.heads, problem.head_dim)
    num_runs = -(-problem.length // BLOCK_SIZE)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device=device, dtype=dtype)

    runs = normal(shape[0], num_runs, *shape[2:]) * focus
    shared = runs.repeat_interleave(BLOCK_SIZE, dim=1)[:, : problem.length]
    query, key = (normal(*shape).mul_(0.5).add_(shared).transpose(1, 2) for _ in range(2))
    return AttentionTensors(problem.name, query, key, normal(*shape).transpose(1, 2))


def threshold_for_density(scores: Tensor, density: float, forced: ForcedBlocks) -> float:
    """The threshold whose selection keeps ``density`` of all blocks, as nearly as rows allow."""
    low, high = 0.0, 1.0
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        if density_of(select_block_lists(scores, middle, forced)) < density:
            low = middle
        else:
            high = middle
    return high


def density_of(blocks: BlockLists) -> float:
    """Kept blocks over all blocks."""
    return blocks.counts.sum().item() / blocks.indices.numel()
