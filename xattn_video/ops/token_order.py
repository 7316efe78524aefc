"""Orders of the video tokens in which consecutive tokens form a compact piece of the video."""

from functools import lru_cache

import torch
from torch import Tensor


@lru_cache(maxsize=4)
def hilbert_order(grid: tuple[int, ...]) -> Tensor:
    """The raster numbers of a grid's cells in the order of a Hilbert curve, int64 `[cells]`.

    The curve fills the smallest cube of 2^n cells a side that holds the grid; cells outside the
    grid are left out. Algorithm: J. Skilling, "Programming the Hilbert curve", AIP Conference
    Proceedings 707 (2004).

    Args:
        grid: Cells in each dimension, such as frames, rows and columns.
    """
    bits = max(1, (max(grid) - 1).bit_length())
    ranges = (torch.arange(size) for size in grid)
    axes = [axis.flatten() for axis in torch.meshgrid(*ranges, indexing="ij")]
    # Undo the rotations and reflections, from the largest cube to the smallest.
    for bit in reversed(range(1, bits)):
        low = (1 << bit) - 1
        for number, axis in enumerate(axes):
            reflects = (axis >> bit & 1).bool()
            swapped = (axes[0] ^ axis) & low
            if number:
                axes[number] = axis.where(reflects, axis ^ swapped)
            axes[0] = (axes[0] ^ low).where(reflects, axes[0] ^ swapped)
    # Gray code to number.
    for number in range(1, len(axes)):
        axes[number] = axes[number] ^ axes[number - 1]
    turned = torch.zeros_like(axes[0])
    for bit in range(1, bits):
        turned ^= torch.where((axes[-1] >> bit & 1).bool(), (1 << bit) - 1, 0)
    place = torch.zeros_like(axes[0])
    for bit in reversed(range(bits)):
        for axis in axes:
            place = place << 1 | (axis ^ turned) >> bit & 1
    return place.argsort()
