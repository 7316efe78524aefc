"""What is compared: dense attention, dense attention once more, and a grid of sparse settings."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from xattn_video.policy.settings import SparseSettings


@dataclass(frozen=True, slots=True)
class Method:
    """One way to compute attention.

    Attributes:
        name: For files.
        label: For people.
        sparse: None for dense attention.
    """

    name: str
    label: str
    sparse: SparseSettings | None = None


DENSE = Method("dense", "dense")
DENSE_AGAIN = Method("dense-again", "dense again")


def sparse_methods(
    thresholds: Sequence[float],
    warmup_steps: Sequence[int],
    strides: Sequence[int],
    **shared: Any,
) -> list[Method]:
    """Every combination, strides outermost, thresholds innermost; none comes twice.

    Args:
        thresholds, warmup_steps, strides: The grid.
        shared: Other arguments of `SparseSettings`.

    Raises:
        ValueError: A value is out of range.
    """
    grid = itertools.product(
        dict.fromkeys(strides), dict.fromkeys(warmup_steps), dict.fromkeys(thresholds)
    )
    return [
        Method(
            f"tau{tau:g}-warmup{warmup}-stride{stride}",
            f"tau {tau:g}, warm-up {warmup}, stride {stride}",
            SparseSettings(tau, stride=stride, warmup_steps=warmup, **shared),
        )
        for stride, warmup, tau in grid
    ]
