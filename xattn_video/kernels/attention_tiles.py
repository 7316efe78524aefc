"""How the attention kernel cuts its work: the tiles for each dtype, head and device."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from xattn_video.kernels.support import INTERPRETING, fits_descriptor, nvidia_capability


@dataclass(frozen=True, slots=True)
class AttentionTiles:
    """How the work is cut: queries of a program and keys of a step; they divide a block.

    With descriptors TMA loads the tiles. Overlapped, the values of one step are added while the
    softmax of the next is taken.
    """

    tile_m: int
    tile_n: int
    num_warps: int
    num_stages: int
    descriptors: bool = False
    overlapped: bool = False
    max_registers: int | None = None


def choose_attention_tiles(
    query: Tensor, key: Tensor, value: Tensor, block_size: int
) -> AttentionTiles:
    """The tiles for the dtype, the head and the device."""
    tiles = _tiles(query, block_size)
    head_dim = query.shape[-1]
    # A descriptor's box has a power of two of columns.
    can_describe = head_dim & (head_dim - 1) == 0 and all(
        map(fits_descriptor, (query, key, value))
    )
    return replace(tiles, descriptors=tiles.descriptors and can_describe)


def _tiles(query: Tensor, block_size: int) -> AttentionTiles:
    half = query.dtype != torch.float32
    wide = query.shape[-1] > 128
    if INTERPRETING:
        return AttentionTiles(64, 64, 1, 1, descriptors=half, overlapped=half)
    if not half:
        # Exact products keep their operands in registers, which hold no more than this.
        return AttentionTiles(32, 16 if wide else 32, num_warps=8, num_stages=2)
    if wide:
        return AttentionTiles(64, 32, num_warps=4, num_stages=2)
    num_warps = block_size // 16
    capability = nvidia_capability(query.device)
    if capability == (9, 0):
        return AttentionTiles(block_size, 64, block_size // 32, 2, descriptors=True)
    # A third stage needs more shared memory than the 99 KiB of consumer GPUs.
    return AttentionTiles(block_size, 64, num_warps, num_stages=3 if capability == (10, 0) else 2)
