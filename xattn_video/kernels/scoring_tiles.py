"""Tile sizes of the scoring kernel for each dtype and device, and the launches they need."""

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from xattn_video.kernels.support import INTERPRETING, fits_descriptor, nvidia_capability


@dataclass(frozen=True, slots=True)
class Tiles:
    """Launch parameters; tile_m x tile_n groups and tile_k of the inner dimension are a tile.

    Programs work on raster rows of tiles at a time. With descriptors, TMA loads the tiles.
    """

    tile_m: int
    tile_n: int
    tile_k: int
    num_warps: int
    num_stages: int
    programs_per_multiprocessor: int = 1
    raster: int = 8
    descriptors: bool = False


# In half precision L2 traffic is the limit, and it falls as tiles grow. The registers of 8 warps
# hold at most 128 x 256 accumulators, and 227 KiB of shared memory at most 4 stages.
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
        # A power of two that divides head_dim, so that no load needs a mask.
        tile_k=math.gcd(tiles.tile_k, query.shape[-1]),
        descriptors=tiles.descriptors and all(map(fits_descriptor, (query, key))),
    )


class Rectangle(NamedTuple):
    """The tiles of one launch."""

    first_m: int
    num_m: int
    first_n: int
    num_n: int
    descriptors: bool


def rectangles(
    Sq: int, Sk: int, stride: int, tiles: Tiles, descriptors: bool
) -> Iterator[Rectangle]:
    """Launches that cover all tiles; those with cut groups run apart and load by pointers."""
    tiles_m = -(-Sq // (tiles.tile_m * stride))
    tiles_n = -(-Sk // (tiles.tile_n * stride))
    if not descriptors:
        yield Rectangle(0, tiles_m, 0, tiles_n, False)
        return
    whole_m, whole_n = tiles_m - (Sq % stride > 0), tiles_n - (Sk % stride > 0)
    if whole_m and whole_n:
        yield Rectangle(0, whole_m, 0, whole_n, True)
    if whole_n < tiles_n:
        yield Rectangle(0, tiles_m, whole_n, 1, False)
    if whole_m < tiles_m and whole_n:
        yield Rectangle(whole_m, 1, 0, whole_n, False)


# Cached, because every layer of a forward pass needs the same.
@functools.lru_cache(maxsize=64)
def seen_tiles(
    rectangle: Rectangle, Sq: int, Sk: int, stride: int, tiles: Tiles, device: torch.device
) -> Tensor:
    """The tiles of a rectangle that causal queries see, ``raster`` rows of tiles at a time.

    Returns:
        int32 `[tiles]`: row * (tiles in a row) + column of each tile.
    """
    tokens_m, tokens_n = tiles.tile_m * stride, tiles.tile_n * stride
    bands = -(-rectangle.num_m // tiles.raster)
    # [bands, 1, raster] and [num_n, 1]
    rows = torch.arange(bands * tiles.raster, device="cpu").view(bands, 1, -1)
    inside = rows < rectangle.num_m
    rows = rows + rectangle.first_m
    columns = torch.arange(rectangle.num_n, device="cpu")[:, None] + rectangle.first_n
    last_keys = ((rows + 1) * tokens_m).clamp(max=Sq) - 1 + Sk - Sq
    numbers = rows * -(-Sk // tokens_n) + columns
    return numbers[inside & (columns * tokens_n <= last_keys)].to(device, torch.int32)


def program_count(device: torch.device, tiles: Tiles) -> int:
    """The number of programs that run at once; two if kernels are interpreted."""
    if INTERPRETING:
        return 2
    multiprocessors: int = torch.cuda.get_device_properties(device).multi_processor_count
    return multiprocessors * tiles.programs_per_multiprocessor
