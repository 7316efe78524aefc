"""A selection of blocks: a value that is kept, reused and measured."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class BlockLists:
    """The key blocks of each row of blocks, as the kernels walk them.

    counts is int32 `[B, H, Nq]`; indices is int32 `[B, H, Nq, Nk]`, of which the first ``counts``
    of a row are its blocks, ascending; the others follow, each once.
    """

    counts: Tensor
    indices: Tensor

    @classmethod
    def from_mask(cls, block_mask: Tensor) -> "BlockLists":
        """The lists of a bool mask `[B, H, Nq, Nk]`, without a host synchronisation."""
        counts = block_mask.sum(dim=-1, dtype=torch.int32)
        indices = torch.argsort(~block_mask, dim=-1, stable=True).to(torch.int32)
        return cls(counts, indices)

    def to_mask(self) -> Tensor:
        """The block mask, bool `[B, H, Nq, Nk]`; True = compute."""
        places = torch.arange(self.indices.shape[-1], device=self.indices.device)
        listed = places < self.counts[..., None]
        return torch.empty_like(listed).scatter_(-1, self.indices.long(), listed)
