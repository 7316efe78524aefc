"""Tile sizes of the attention kernel for each dtype, head size and device."""

from dataclasses import dataclass

import torch
from torch import Tensor

from xattn_video.kernels.support import INTERPRETING, fits_descriptor, nvidia_capability


@dataclass(frozen=True, slots=True)
class AttentionTiles:
    """Launch parameters: tile_m queries per program, tile_n keys per step; both divide a block.

    With descriptors, TMA loads the tiles.
    """

    tile_m: int
    tile_n: int
    num_warps: int
    num_stages: int
    descriptors: bool = False


def choose_attention_tiles(
    query: Tensor, key: Tensor, value: Tensor, block_size: int
) -> AttentionTiles:
    """The tile sizes for the dtype, the head size and the device."""
    head_dim = query.shape[-1]
    half = query.dtype != torch.float32
    # The number of columns of a descriptor's box is a power of two.
    descriptors = (
        half and head_dim & (head_dim - 1) == 0 and all(map(fits_descriptor, (query, key, value)))
    )
    if INTERPRETING:
        return AttentionTiles(64, 64, num_warps=1, num_stages=1, descriptors=descriptors)
    if not half:
        # Exact float32 products keep their operands in registers; larger tiles do not fit.
        return AttentionTiles(32, 16 if head_dim > 128 else 32, num_warps=8, num_stages=2)
    if head_dim > 128:
        return AttentionTiles(64, 32, num_warps=4, num_stages=2)
    capability = nvidia_capability(query.device)
    if capability == (9, 0) and descriptors:
        # Leaves room for two programs: one multiplies while the other computes its softmax.
        num_stages = 2 if block_size == 128 else 3
        return AttentionTiles(block_size, 64, 4, num_stages, descriptors=True)
    # A third stage needs more shared memory than the 99 KiB of consumer GPUs.
    num_stages = 3 if capability in ((9, 0), (10, 0)) else 2
    return AttentionTiles(block_size, 64, num_warps=block_size // 16, num_stages=num_stages)
