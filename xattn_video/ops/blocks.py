"""A selection of blocks as a value that can be kept and reused; the blocks that none may lack."""

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


@dataclass(frozen=True, slots=True)
class ForcedBlocks:
    """A description of the forced blocks; `to_mask` writes them out.

    Causal attention keeps key block 0 and the diagonal. Where the last ``num_text_tokens`` keys
    are text, every block that touches a valid text key is kept, and every valid block of the rows
    that hold a valid text query. key_lengths is int32 `[B]`, or None where all keys are valid.
    """

    query_length: int
    key_length: int
    block_size: int
    causal: bool = False
    num_text_tokens: int = 0
    key_lengths: Tensor | None = None

    def to_mask(self, device: torch.device) -> Tensor | None:
        """bool, broadcastable to `[B, H, Nq, Nk]`; None where nothing is forced."""
        Sq, Sk, block_size = self.query_length, self.key_length, self.block_size
        if self.causal:
            return sink_blocks(Sk, block_size=block_size, device=device) | diagonal_blocks(
                Sq, Sk, block_size=block_size, device=device
            )
        if self.num_text_tokens == 0:
            return None
        return text_blocks(
            Sq,
            Sk,
            num_text_tokens=self.num_text_tokens,
            key_lengths=self.key_lengths,
            block_size=block_size,
            device=device,
        )


def sink_blocks(key_length: int, *, block_size: int, device: torch.device) -> Tensor:
    """Key block 0 in every row, `[1, 1, 1, Nk]`."""
    return (_block_range(key_length, block_size, device) == 0)[None, None, None]


def diagonal_blocks(
    query_length: int, key_length: int, *, block_size: int, device: torch.device
) -> Tensor:
    """The block of each row's last query, aligned at the end, `[1, 1, Nq, Nk]`."""
    rows = _block_range(query_length, block_size, device)[:, None]
    last_query = ((rows + 1) * block_size).clamp(max=query_length) - 1
    diagonal = (last_query + key_length - query_length).clamp(min=0) // block_size
    return (_block_range(key_length, block_size, device) == diagonal)[None, None]


def text_blocks(
    query_length: int,
    key_length: int,
    *,
    num_text_tokens: int,
    key_lengths: Tensor | None,
    block_size: int,
    device: torch.device,
) -> Tensor:
    """Columns with a valid text key and rows with a valid text query, `[B or 1, 1, Nq, Nk]`.

    The text is the last ``num_text_tokens`` of ``key_length``; item b's is valid up to
    ``key_lengths[b]``, all of it if None.
    """
    num_video_tokens = key_length - num_text_tokens
    lengths = torch.full((1,), key_length, device=device) if key_lengths is None else key_lengths
    # [B or 1, 1, 1, 1]
    lengths = lengths[:, None, None, None]
    rows = _block_range(query_length, block_size, device)[:, None]
    columns = _block_range(key_length, block_size, device)
    valid = columns * block_size < lengths
    text_columns = valid & ((columns + 1) * block_size > num_video_tokens)
    text_rows = ((rows + 1) * block_size > num_video_tokens) & (rows * block_size < lengths)
    has_text = lengths > num_video_tokens
    return has_text & (text_columns | (text_rows & valid))


def _block_range(length: int, block_size: int, device: torch.device) -> Tensor:
    return torch.arange(-(-length // block_size), device=device)
