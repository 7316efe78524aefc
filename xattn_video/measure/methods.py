"""The methods to compare: dense attention, dense attention again, and sparse settings."""

import hashlib
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from xattn_video.policy.schedule import ThresholdSchedule
from xattn_video.policy.settings import SparseSettings


@dataclass(frozen=True, slots=True)
class Method:
    """One way to compute attention.

    Attributes:
        name: The name in file names.
        label: The name shown to people.
        sparse: The sparse settings; None for dense attention.
    """

    name: str
    label: str
    sparse: SparseSettings | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        sparse = None if self.sparse is None else self.sparse.to_dict()
        return {"name": self.name, "label": self.label, "sparse": sparse}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Method":
        """The inverse of `to_dict`."""
        sparse = values["sparse"]
        if sparse is not None:
            sparse = SparseSettings.from_dict(sparse)
        return cls(values["name"], values["label"], sparse)


DENSE = Method("dense", "dense")
DENSE_AGAIN = Method("dense-again", "dense again")


def sparse_methods(grid: Mapping[str, Sequence[Any]], **shared: Any) -> list[Method]:
    """Every combination of the grid, without duplicates.

    Args:
        grid: {field of `SparseSettings`: its values}. Thresholds and densities exclude each
            other, so each of them is combined with the other fields. Schedules are allowed. A
            refresh_every of 0 means never.
        shared: Other arguments of `SparseSettings`.

    Raises:
        ValueError: A value is out of range.
    """
    shares: list[dict[str, Any]] = [
        {name: value} for name in ("threshold", "density") for value in grid.get(name, ())
    ]
    rest = {name: values for name, values in grid.items() if name not in ("threshold", "density")}
    methods: dict[str, Method] = {}
    for values in itertools.product(*rest.values()):
        combined = dict(zip(rest, values, strict=True))
        combined["refresh_every"] = combined.get("refresh_every") or None
        for share in shares or [{}]:
            method = method_of(SparseSettings(**share, **combined, **shared))
            methods.setdefault(method.name, method)
    return list(methods.values())


def method_of(sparse: SparseSettings) -> Method:
    """The method of sparse settings, with a name and a label made from them."""
    if isinstance(sparse.density, ThresholdSchedule):
        # The digest distinguishes files that differ only in their heads.
        digest = hashlib.sha256(json.dumps(sparse.density.to_dict()).encode()).hexdigest()[:4]
        share = f"densities {sparse.density.threshold(0):g} {digest}"
    elif sparse.density is not None:
        share = f"density {sparse.density:g}"
    elif isinstance(sparse.threshold, int | float):
        share = f"tau {sparse.threshold:g}"
    else:
        share = "schedule"
    parts = [share, f"warm-up {sparse.warmup_steps}", f"stride {sparse.stride}"]
    if sparse.token_order != "raster":
        parts.append(sparse.token_order)
    if sparse.compensation != "none":
        parts.append(sparse.compensation)
    if sparse.mask_every != 1:
        parts.append(f"mask {sparse.mask_every}")
    if sparse.refresh_every is not None:
        parts.append(f"refresh {sparse.refresh_every}")
    name = "-".join(part.replace(" ", "").replace("-", "") for part in parts)
    return Method(name, ", ".join(parts), sparse)


def told_apart(methods: Sequence[Method]) -> list[Method]:
    """The methods, each once; those of one name get what they differ in into name and label."""
    by_name: dict[str, list[Method]] = {}
    for method in methods:
        same = by_name.setdefault(method.name, [])
        if method not in same:
            same.append(method)
    return [method for same in by_name.values() for method in _with_differences(same)]


def _with_differences(methods: Sequence[Method]) -> list[Method]:
    differing = [
        source.name
        for source in fields(SparseSettings)
        if any(
            getattr(method.sparse, source.name) != getattr(methods[0].sparse, source.name)
            for method in methods
            if method.sparse is not None
        )
    ]
    told = []
    for method in methods:
        others = [f"{name.replace('_', ' ')} {getattr(method.sparse, name)}" for name in differing]
        name = "-".join([method.name, *(part.replace(" ", "") for part in others)])
        told.append(Method(name, ", ".join([method.label, *others]), method.sparse))
    return told
