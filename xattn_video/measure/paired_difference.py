"""Paired differences and their confidence intervals."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

_RESAMPLES = 10_000
_LEVEL = 95
# Resamples drawn at a time, which bounds the memory.
_CHUNK = 500


@dataclass(frozen=True, slots=True)
class Difference:
    """The mean of paired differences.

    Attributes:
        pairs: Number of items, such as videos, for which both runs have a value.
        mean: Mean of second minus first.
        low, high: The 95% bootstrap interval; None with fewer than two prompts.
    """

    pairs: int
    mean: float
    low: float | None
    high: float | None

    @property
    def interval(self) -> str:
        """The interval as text; "-" if there is none."""
        if self.low is None or self.high is None:
            return "-"
        return f"[{self.low:+.4f}, {self.high:+.4f}]"


def paired_difference(
    first: Mapping[str, float], second: Mapping[str, float], prompts: Mapping[str, str]
) -> Difference | None:
    """Compare two runs item by item; None if they share no item.

    Args:
        first, second: {item, such as a video: value}.
        prompts: {item: prompt}. Whole prompts are resampled, because their items are similar.
    """
    shared = [name for name in first if name in second]
    if not shared:
        return None
    groups: dict[str, list[float]] = {}
    for name in shared:
        groups.setdefault(prompts[name], []).append(second[name] - first[name])
    sums = np.array([sum(group) for group in groups.values()])
    counts = np.array([len(group) for group in groups.values()])
    mean = float(sums.sum() / counts.sum())
    if len(groups) < 2:
        return Difference(len(shared), mean, None, None)
    # A fixed seed, so that the same runs give the same report.
    generator = np.random.default_rng(0)
    means = []
    for _ in range(_RESAMPLES // _CHUNK):
        drawn = generator.integers(0, len(groups), (_CHUNK, len(groups)))
        means.append(sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1))
    tail = (100 - _LEVEL) / 2
    low, high = np.percentile(np.concatenate(means), (tail, 100 - tail))
    return Difference(len(shared), mean, float(low), float(high))
