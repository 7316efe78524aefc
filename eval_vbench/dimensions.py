"""VBench's dimensions, and its Quality, Semantic and Total scores."""

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

DATA = Path(__file__).parent / "data"
GROUPS = ("quality", "semantic")


@dataclass(frozen=True, slots=True)
class Dimension:
    """One of VBench's 16 dimensions.

    Attributes:
        name: VBench's name of the dimension.
        group: One of `GROUPS`.
        weight: Its weight within the group.
        lowest, highest: The scores that VBench maps to 0 and 1.
    """

    name: str
    group: str
    weight: float
    lowest: float
    highest: float

    def normalise(self, score: float) -> float:
        """VBench's linear map; like VBench, it does not clip."""
        return (score - self.lowest) / (self.highest - self.lowest)


@dataclass(frozen=True, slots=True)
class Totals:
    """VBench's summary of the 16 scores."""

    quality: float
    semantic: float
    total: float


@functools.cache
def dimensions() -> dict[str, Dimension]:
    """All dimensions by name, in VBench's order."""
    listed = [Dimension(**row) for row in _constants()["dimensions"]]
    return {dimension.name: dimension for dimension in listed}


def totals(scores: Mapping[str, float]) -> Totals | None:
    """Quality, Semantic and Total; None unless all 16 dimensions are present.

    VBench's own script silently counts a missing dimension as 0.
    """
    if not set(dimensions()) <= set(scores):
        return None
    quality, semantic = (_group_score(group, scores) for group in GROUPS)
    weights: dict[str, float] = _constants()["group_weights"]
    total = weights["quality"] * quality + weights["semantic"] * semantic
    return Totals(quality, semantic, total / sum(weights.values()))


def check_dimensions(names: list[str]) -> None:
    """Raise ValueError, with the known names, unless all names are VBench's."""
    for name in names:
        if name not in dimensions():
            raise ValueError(f"unknown dimension {name!r}; VBench has {', '.join(dimensions())}.")


def _group_score(group: str, scores: Mapping[str, float]) -> float:
    members = [dimension for dimension in dimensions().values() if dimension.group == group]
    weighted = sum(member.weight * member.normalise(scores[member.name]) for member in members)
    return weighted / sum(member.weight for member in members)


@functools.cache
def _constants() -> dict:  # type: ignore[type-arg]
    return json.loads((DATA / "dimensions.json").read_text(encoding="utf-8"))
