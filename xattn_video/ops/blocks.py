"""A selection of blocks as a value that can be kept, reused and measured."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
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

    @classmethod
    def from_bits(cls, bits: Tensor, columns: int) -> "BlockLists":
        """The lists of what `to_bits` returned for ``columns`` key blocks."""
        places = torch.arange(8, dtype=torch.uint8, device=bits.device)
        mask = (bits[..., None] >> places & 1).flatten(-2)
        return cls.from_mask(mask[..., :columns].bool())

    def to_bits(self) -> Tensor:
        """The block mask with 8 blocks in a byte, uint8 `[B, H, Nq, ceil(Nk / 8)]`."""
        columns = self.indices.shape[-1]
        mask = F.pad(self.to_mask(), (0, -columns % 8)).unflatten(-1, (-1, 8))
        places = torch.arange(8, dtype=torch.uint8, device=mask.device)
        return (mask.to(torch.uint8) << places).sum(dim=-1, dtype=torch.uint8)

    def to_mask(self) -> Tensor:
        """The block mask, bool `[B, H, Nq, Nk]`; True = compute."""
        places = torch.arange(self.indices.shape[-1], device=self.indices.device)
        listed = places < self.counts[..., None]
        return torch.empty_like(listed).scatter_(-1, self.indices.long(), listed)


def count_causal_blocks(query_length: int, key_length: int, block_size: int) -> int:
    """Blocks of one head that dense causal attention computes, aligned at the end."""
    rows = -(-query_length // block_size)
    # The block of the last key before the first query; -1 if there is none.
    before = (key_length - query_length - 1) // block_size
    whole = rows - 1
    return whole * (before + 2) + whole * (whole - 1) // 2 + -(-key_length // block_size)
