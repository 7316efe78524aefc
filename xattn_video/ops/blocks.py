"""A selection of blocks as a value that can be kept, reused and measured."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class BlockLists:
    """The selected key blocks of each row of blocks, as the kernels read them.

    counts is int32 `[B, H, Nq]`, the number of selected blocks in each row. indices is int32
    `[B, H, Nq, Nk]`: first the selected blocks of the row, ascending, then every other block once.
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
