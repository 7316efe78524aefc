"""Blocks that are computed regardless of their score."""

from dataclasses import dataclass

import torch
from torch import Tensor


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
