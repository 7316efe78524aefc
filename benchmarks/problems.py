"""Named attention problems, and inputs for them."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class AttentionProblem:
    """Self-attention over ``length`` tokens."""

    name: str
    length: int
    heads: int
    head_dim: int
    batch: int = 1

    @property
    def dense_flops(self) -> float:
        """Multiplications and additions of both matrix products, every pair of tokens counted."""
        return 4.0 * self.batch * self.heads * self.length**2 * self.head_dim


PROBLEMS = {
    problem.name: problem
    for problem in (
        AttentionProblem("hunyuan-720p-129f", 33 * 45 * 80 + 256, heads=24, head_dim=128),
        AttentionProblem("hunyuan-544p-129f", 33 * 34 * 60 + 256, heads=24, head_dim=128),
        AttentionProblem("hunyuan-720p-33f", 9 * 45 * 80 + 256, heads=24, head_dim=128),
        AttentionProblem("demo-512p-65f", 17 * 32 * 32 + 256, heads=2, head_dim=128),
        AttentionProblem("cpu-8k", 8192, heads=4, head_dim=64),
        AttentionProblem("cpu-2k", 2048, heads=4, head_dim=64),
    )
}


def clustered_inputs(
    problem: AttentionProblem, device: torch.device, dtype: torch.dtype, *, focus: float = 0.6
) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value `[B, H, S, D]`, stored `[B, S, H, D]` as Diffusers hands them over.

    Runs of 128 tokens share a direction, so that some blocks hold more mass than others; a larger
    ``focus`` gives fewer blocks more of it. Random, not taken from a model.
    """
    generator = torch.Generator(device).manual_seed(0)
    shape = (problem.batch, problem.length, problem.heads, problem.head_dim)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device=device)

    runs = normal(shape[0], -(-shape[1] // 128), *shape[2:]) * focus
    shared = runs.repeat_interleave(128, dim=1)[:, : shape[1]]
    query, key = (shared + 0.5 * normal(*shape) for _ in range(2))
    value = normal(*shape)
    return tuple(tensor.to(dtype).transpose(1, 2) for tensor in (query, key, value))


def random_block_mask(problem: AttentionProblem, density: float, device: torch.device) -> Tensor:
    """A block mask of 128x128 blocks with the same number of kept blocks in every row."""
    blocks = -(-problem.length // 128)
    generator = torch.Generator(device).manual_seed(1)
    shape = (problem.batch, problem.heads, blocks, blocks)
    ranks = torch.rand(shape, generator=generator, device=device).argsort(dim=-1).argsort(dim=-1)
    return ranks < max(1, round(density * blocks))
