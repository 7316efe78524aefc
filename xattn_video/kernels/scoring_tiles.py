"""How the scoring kernel cuts its work: the tiles for each dtype and device."""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from xattn_video.kernels.support import INTERPRETING, fits_descriptor, nvidia_capability


@dataclass(frozen=True, slots=True)
class Tiles:
    """How the work is cut: query groups, key groups and inner dimension of a tile.

    raster rows of tiles are worked on at a time. With descriptors TMA loads the tiles.
    """

    tile_m: int
    tile_n: int
    tile_k: int
    num_warps: int
    num_stages: int
    programs_per_multiprocessor: int = 1
    raster: int = 8
    descriptors: bool = False


# In half precision the traffic from L2 is the limit, and it falls as tiles grow: 128 x 256
# accumulators are what the registers of 8 warps hold, 4 stages what 227 KiB of shared memory do.
HALF_HOPPER = Tiles(128, 256, 64, num_warps=8, num_stages=4, descriptors=True)
HALF_LARGE = Tiles(128, 256, 64, num_warps=8, num_stages=4)
HALF = Tiles(128, 128, 32, num_warps=8, num_stages=3)
SINGLE = Tiles(64, 64, 32, num_warps=4, num_stages=2, programs_per_multiprocessor=2)
FLOAT8 = Tiles(128, 256, 128, num_warps=8, num_stages=4, raster=16, descriptors=True)
FLOAT8_SMALL = Tiles(128, 128, 64, num_warps=8, num_stages=3)
INTERPRETED = Tiles(64, 64, 128, num_warps=1, num_stages=1, raster=2, descriptors=True)


def choose_tiles(query: Tensor, key: Tensor, groups: int) -> Tiles:
    """The tiles for the dtype and the device; a tile holds whole blocks of ``groups`` groups."""
    if INTERPRETING:
        tiles = INTERPRETED
    elif query.dtype == torch.float32:
        tiles = SINGLE
    else:
        capability = nvidia_capability(query.device)
        if query.dtype == torch.float8_e4m3fn:
            tiles = FLOAT8 if capability == (9, 0) else FLOAT8_SMALL
        else:
            large = {(9, 0): HALF_HOPPER, (10, 0): HALF_LARGE}
            tiles = HALF if capability is None else large.get(capability, HALF)
    return replace(
        tiles,
        tile_m=max(tiles.tile_m, groups),
        tile_n=max(tiles.tile_n, groups),
        # The largest power of two that divides head_dim: no load needs a mask.
        tile_k=math.gcd(tiles.tile_k, query.shape[-1]),
        descriptors=tiles.descriptors and all(map(fits_descriptor, (query, key))),
    )


def program_count(device: torch.device, tiles: Tiles) -> int:
    """The number of programs that run at once; two if kernels are interpreted."""
    if INTERPRETING:
        return 2
    multiprocessors: int = torch.cuda.get_device_properties(device).multi_processor_count
    return multiprocessors * tiles.programs_per_multiprocessor
