"""Selected blocks as lists, the forced blocks, and selection by score."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from xattn_video.kernels.support import device_unsupported_reasons

# Longer rows do not fit in a program's registers; torch sorts them instead.
_LARGEST_KERNEL_ROW = 8192
# The lowest score of a valid block.
_SMALLEST_TARGET = torch.finfo(torch.float32).tiny


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
        """The inverse of `to_bits`; ``columns`` is the number of key blocks."""
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
    """A description of the forced blocks; `to_mask` makes their mask.

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
    """The blocks of each row's first to last query, aligned at the end, `[1, 1, Nq, Nk]`.

    These are two where ``key_length - query_length`` is no multiple of ``block_size``.
    """
    rows = _block_range(query_length, block_size, device)[:, None]
    queries = rows * block_size, ((rows + 1) * block_size).clamp(max=query_length) - 1
    first, last = (
        (query + key_length - query_length).clamp(min=0) // block_size for query in queries
    )
    columns = _block_range(key_length, block_size, device)
    return ((columns >= first) & (columns <= last))[None, None]


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


def select_block_lists(
    scores: Tensor, threshold: float | Tensor, forced: ForcedBlocks, by_count: bool = False
) -> BlockLists:
    """The selection of `select_blocks` as lists; the kernel makes them without a mask.

    Args:
        scores: float32 `[B, H, Nq, Nk]`, as from `block_scores`.
        threshold: As in `select_blocks`, but not checked.
        forced: Describes the blocks that are kept at any score.
        by_count: The threshold is a share of each row's valid blocks, rounded to a whole number,
            instead of its mass: forced blocks count first, then the best-scoring ones.
    """
    threshold = torch.as_tensor(threshold, dtype=torch.float32, device=scores.device)
    on_kernel = scores.is_cuda and scores.shape[-1] <= _LARGEST_KERNEL_ROW
    if not on_kernel or device_unsupported_reasons(scores.device):
        mask = forced.to_mask(scores.device)
        if mask is None:
            mask = scores.new_zeros((), dtype=torch.bool)
        mask = fewest_blocks(scores, threshold, mask.expand_as(scores), by_count)
        return BlockLists.from_mask(mask)
    return kernel_block_lists(scores, threshold, forced, by_count)


def kernel_block_lists(
    scores: Tensor, threshold: Tensor, forced: ForcedBlocks, by_count: bool = False
) -> BlockLists:
    """`select_block_lists` with the Triton kernel; the caller checks that it can run."""
    # Imported here so that selection works where Triton is missing.
    from xattn_video.kernels.block_selection import block_selection

    counts, indices = block_selection(
        scores,
        threshold.expand(scores.shape[:-1]),
        query_length=forced.query_length,
        key_length=forced.key_length,
        block_size=forced.block_size,
        causal=forced.causal,
        num_text_tokens=forced.num_text_tokens,
        key_lengths=forced.key_lengths,
        by_count=by_count,
    )
    return BlockLists(counts, indices)


def fewest_blocks(
    scores: Tensor, threshold: Tensor, forced: Tensor, by_count: bool = False
) -> Tensor:
    """`select_blocks` for checked inputs; the threshold broadcasts to `[B, H, Nq]`."""
    threshold = threshold.to(scores.dtype).unsqueeze(-1)
    order = scores.masked_fill(forced, float("inf")).argsort(dim=-1, descending=True, stable=True)
    weights = (scores != 0).to(scores.dtype) if by_count else scores
    before = F.pad(weights.gather(-1, order).cumsum(dim=-1)[..., :-1], (1, 0))
    total = scores.sum(dim=-1, keepdim=True)
    target = threshold * weights.sum(dim=-1, keepdim=True)
    if by_count:
        target = (target + 0.5).floor().clamp(min=1)
    # An unchecked threshold may be too low; the best block is kept anyway.
    target = target.where(target > _SMALLEST_TARGET, _SMALLEST_TARGET)
    keep = torch.zeros_like(order, dtype=torch.bool)
    keep.scatter_(-1, order, before < target)
    # Every comparison with NaN is False.
    keep_all = ~(threshold < 1) | ~total.isfinite()
    return (keep | forced | keep_all) & (scores != 0)
