"""Thresholds, or shares of blocks, by denoising step, layer and head."""

import bisect
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

from xattn_video.files import write_json

Points: TypeAlias = tuple[tuple[int, float], ...]
Interpolation: TypeAlias = Literal["hold", "linear", "cosine"]
Kind: TypeAlias = Literal["threshold", "density"]
ThresholdLike: TypeAlias = (
    "float | Sequence[float] | Mapping[int, float] | Callable[[int], float] | ThresholdSchedule"
)


@dataclass(frozen=True, slots=True)
class ThresholdSchedule:
    """The threshold tau of every denoising step; layers and heads can have their own values.

    Steps count from 0, warm-up included. Before the first point, the first tau holds; after the
    last point, the last tau. A step runs dense if every tau is 1.

    Args:
        points: (step, tau) pairs, steps ascending, 0 < tau <= 1.
        interpolation: Tau between two points: ``"hold"`` keeps the earlier tau, ``"linear"`` is a
            straight ramp, ``"cosine"`` a ramp that is flat at both ends.
        layers: {layer: points} replaces ``points`` in that layer. Layers count from 0, first the
            double-stream blocks, then the single-stream blocks.
        heads: {(layer, head): points} replaces both in that head.
        kind: ``"density"`` if the values are shares of the blocks, for `SparseSettings.density`;
            ``"threshold"`` otherwise.

    Raises:
        ValueError: A tau outside (0, 1], steps that do not ascend, or an unknown kind.
        TypeError: A value that should be a number is not.
    """

    points: Points
    interpolation: Interpolation = "hold"
    layers: Mapping[int, Points] = field(default_factory=dict)
    heads: Mapping[tuple[int, int], Points] = field(default_factory=dict)
    kind: Kind = "threshold"

    def __post_init__(self) -> None:
        for name, choices in (("interpolation", Interpolation), ("kind", Kind)):
            if getattr(self, name) not in get_args(choices):
                known = ", ".join(map(repr, get_args(choices)))
                raise ValueError(f"{name} must be one of {known}, got {getattr(self, name)!r}.")
        layers = {
            _index(layer, "layers"): _points(points, f"layers.{layer}")
            for layer, points in self.layers.items()
        }
        heads = {
            (_index(layer, "heads"), _index(head, f"heads.{layer}")): _points(
                points, f"heads.{layer}.{head}"
            )
            for (layer, head), points in self.heads.items()
        }
        object.__setattr__(self, "points", _points(self.points, "points"))
        object.__setattr__(self, "layers", layers)
        object.__setattr__(self, "heads", heads)

    @classmethod
    def constant(cls, tau: float) -> "ThresholdSchedule":
        """The same tau at every step."""
        return cls(((0, tau),))

    @classmethod
    def linear(cls, start: float, end: float, num_steps: int) -> "ThresholdSchedule":
        """A straight ramp from step 0 to step ``num_steps - 1``."""
        return cls(_ramp(start, end, num_steps), "linear")

    @classmethod
    def cosine(cls, start: float, end: float, num_steps: int) -> "ThresholdSchedule":
        """Half a cosine wave from step 0 to step ``num_steps - 1``, flat at both ends."""
        return cls(_ramp(start, end, num_steps), "cosine")

    @classmethod
    def piecewise(cls, taus: Mapping[int, float]) -> "ThresholdSchedule":
        """A schedule from {step: tau}; each tau holds until the next step."""
        if not all(isinstance(step, int) for step in taus):
            raise TypeError(f"the keys of a {{step: tau}} mapping must be integers, got {taus!r}.")
        return cls(tuple(sorted(taus.items())))

    @classmethod
    def from_list(cls, taus: Sequence[float]) -> "ThresholdSchedule":
        """A schedule from a list: step i uses entry i; the last entry holds."""
        return cls(tuple(enumerate(taus)))

    @classmethod
    def coerce(cls, value: ThresholdLike) -> "ThresholdSchedule | CallableSchedule":
        """Turn a threshold in any of its forms into a schedule.

        Args:
            value: A float, a list (step i uses entry i, the last one holds), a mapping
                {step: tau} (each holds until the next), a callable step -> tau, or a schedule.

        Raises:
            ValueError, TypeError: A tau is outside (0, 1], or a value is of a wrong type.
        """
        if isinstance(value, ThresholdSchedule | CallableSchedule):
            return value
        if isinstance(value, Mapping | Sequence) and not value:
            raise TypeError(
                f"the threshold must hold at least one tau, got {value!r}; write 0.95 for one tau."
            )
        if isinstance(value, Mapping):
            return cls.piecewise(value)
        if isinstance(value, Sequence) and not isinstance(value, str):
            return cls.from_list(value)
        if callable(value):
            return CallableSchedule(value)
        return cls.constant(_tau(value, "threshold"))

    @property
    def is_uniform(self) -> bool:
        """Whether all layers and heads share their tau."""
        return not self.layers and not self.heads

    @property
    def is_dense(self) -> bool:
        """Whether every tau is 1."""
        of_all = (self.points, *self.layers.values(), *self.heads.values())
        return all(tau == 1 for points in of_all for _, tau in points)

    def threshold(self, step: int, layer: int | None = None, head: int | None = None) -> float:
        """Tau at a step, for a head, a layer, or those without values of their own."""
        points = self.points
        if layer is not None:
            points = self.layers.get(layer, points)
            if head is not None:
                points = self.heads.get((layer, head), points)
        return _interpolate(points, step, self.interpolation)

    def per_head(self, step: int, num_layers: int, num_heads: int) -> list[list[float]]:
        """Tau of every head at a step, `[num_layers][num_heads]`.

        Raises:
            ValueError: The schedule names a layer or a head beyond these numbers.
        """
        if self.is_uniform:
            tau = self.threshold(step)
            return [[tau] * num_heads for _ in range(num_layers)]
        self.check_model(num_layers, num_heads)
        return [
            [self.threshold(step, layer, head) for head in range(num_heads)]
            for layer in range(num_layers)
        ]

    def check_model(self, num_layers: int, num_heads: int) -> None:
        """Raise ValueError if the schedule names a layer or a head that the model lacks."""
        for layer in [*self.layers, *(layer for layer, _ in self.heads)]:
            if layer >= num_layers:
                raise ValueError(
                    f"the schedule names layer {layer}, but the model has {num_layers} "
                    f"layers, 0 to {num_layers - 1}."
                )
        for layer, head in self.heads:
            if head >= num_heads:
                raise ValueError(
                    f"the schedule names head {head} of layer {layer}, but a layer has "
                    f"{num_heads} heads, 0 to {num_heads - 1}."
                )

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; `from_dict` reads them."""
        heads: dict[str, dict[str, Any]] = {}
        for (layer, head), points in self.heads.items():
            heads.setdefault(str(layer), {})[str(head)] = _as_lists(points)
        return {
            # Omitted for thresholds, as in files from before densities existed.
            **({} if self.kind == "threshold" else {"kind": self.kind}),
            "interpolation": self.interpolation,
            "points": _as_lists(self.points),
            "layers": {str(layer): _as_lists(points) for layer, points in self.layers.items()},
            "heads": heads,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "ThresholdSchedule":
        """The schedule that `to_dict` wrote; "points" alone is enough.

        Raises:
            ValueError, TypeError: An unknown key, a wrong type or a tau outside (0, 1], with the
                path of the field.
        """
        _mapping(data, "the schedule")
        known = ("kind", "interpolation", "points", "layers", "heads")
        unknown = [key for key in data if key not in known]
        if unknown:
            raise ValueError(
                f"unknown key {unknown[0]!r} in the schedule; it may hold {', '.join(known)}."
            )
        if "points" not in data:
            raise ValueError('the schedule has no "points"; write [[0, 0.95]] for one tau.')
        return cls(
            data["points"],
            data.get("interpolation", "hold"),
            _by_index(data.get("layers", {}), "layers"),
            {
                (layer, head): points
                for layer, of_layer in _by_index(data.get("heads", {}), "heads").items()
                for head, points in _by_index(of_layer, f"heads.{layer}").items()
            },
            data.get("kind", "threshold"),
        )

    def save(self, path: str | Path) -> None:
        """Write the schedule as JSON; raises FileNotWrittenError if that fails."""
        write_json(path, self.to_dict())

    @classmethod
    def load(cls, path: str | Path) -> "ThresholdSchedule":
        """Read a JSON file that `save` wrote.

        Raises:
            ValueError, TypeError: The file is not a schedule; names the file and the field.
        """
        try:
            text = Path(path).read_text(encoding="utf-8-sig")
            return cls.from_dict(json.loads(text, object_pairs_hook=_without_repetition))
        except UnicodeDecodeError:
            raise ValueError(f"{path} is not UTF-8 text; save it as UTF-8.") from None
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} is not JSON: {error}.") from None
        except RecursionError:
            raise ValueError(
                f'{path} is nested too deeply; a schedule is {{"points": [[0, 0.95]]}}.'
            ) from None
        except (TypeError, ValueError) as error:
            raise type(error)(f"{path}: {error}") from None


@dataclass(frozen=True, slots=True)
class CallableSchedule:
    """A threshold given by a function of the step; it has no JSON form."""

    function: Callable[[int], float]

    @property
    def is_uniform(self) -> bool:
        """True: the function depends on the step only."""
        return True

    @property
    def is_dense(self) -> bool:
        """False: the function's values at other steps are unknown."""
        return False

    def threshold(self, step: int, layer: int | None = None, head: int | None = None) -> float:
        """Tau at a step, the same in every layer and head."""
        return _tau(self.function(step), f"the threshold function's value at step {step}")

    def per_head(self, step: int, num_layers: int, num_heads: int) -> list[list[float]]:
        """Tau of every head at a step, `[num_layers][num_heads]`."""
        tau = self.threshold(step)
        return [[tau] * num_heads for _ in range(num_layers)]

    def to_dict(self) -> dict[str, Any]:
        """Raise TypeError: a function cannot be written as JSON."""
        raise TypeError(
            f"a threshold function ({self.function!r}) cannot be saved as JSON; convert it with "
            "ThresholdSchedule.from_list([function(step) for step in range(num_steps)])."
        )


def read_schedule(file: str | Path) -> ThresholdSchedule:
    """The schedule in a file that a user named.

    Raises:
        ValueError, TypeError: The file cannot be read, or is not a schedule.
    """
    try:
        return ThresholdSchedule.load(file)
    except OSError as error:
        raise ValueError(f"cannot read the schedule {str(file)!r}: {error.strerror}.") from None


def _interpolate(points: Points, step: int, interpolation: Interpolation) -> float:
    """Tau at ``step`` along ``points``."""
    after = bisect.bisect_right(points, step, key=lambda point: point[0])
    if after == 0:
        return points[0][1]
    first_step, first = points[after - 1]
    if after == len(points) or interpolation == "hold":
        return first
    next_step, following = points[after]
    share = (step - first_step) / (next_step - first_step)
    if interpolation == "cosine":
        share = (1 - math.cos(math.pi * share)) / 2
    return first + (following - first) * share


def _ramp(start: float, end: float, num_steps: int) -> Points:
    if num_steps < 2:
        raise ValueError(
            f"a ramp needs num_steps of at least 2, got {num_steps}; "
            "use ThresholdSchedule.constant for one step."
        )
    return ((0, start), (num_steps - 1, end))


def _points(points: object, path: str) -> Points:
    """Checked (step, tau) pairs."""
    if not isinstance(points, Sequence) or isinstance(points, str) or not points:
        raise TypeError(f"{path} must be a list of [step, threshold] pairs, got {points!r}.")
    checked: list[tuple[int, float]] = []
    for number, point in enumerate(points):
        where = f"{path}[{number}]"
        if not isinstance(point, Sequence) or isinstance(point, str) or len(point) != 2:
            raise TypeError(f"{where} must be a [step, threshold] pair, got {point!r}.")
        step = _index(point[0], f"{where}[0]")
        if checked and step <= checked[-1][0]:
            raise ValueError(f"{where}[0]: steps must ascend, got {checked[-1][0]}, then {step}.")
        checked.append((step, _tau(point[1], f"{where}[1]")))
    return tuple(checked)


def _tau(value: object, path: str) -> float:
    """A threshold in (0, 1]."""
    tau = _number(value)
    if tau is None:
        raise TypeError(
            f"{path} must be a number in (0, 1], got {value!r}; a threshold may be a float, a "
            "list, a {step: tau} mapping, a callable or a ThresholdSchedule."
        )
    if not 0 < tau <= 1:
        raise ValueError(f"{path} must lie in (0, 1], got {tau}; try 0.9 or 0.95.")
    return tau


def _number(value: object) -> float | None:
    """The value as a float; None if it is not one number."""
    if isinstance(value, bool) or not hasattr(value, "__float__"):
        return None
    try:
        return float(value)
    # As tensors and arrays of several numbers do, and tensors without data.
    except (TypeError, ValueError, RuntimeError):
        return None


def _index(value: object, path: str) -> int:
    """A step, layer or head: an integer from 0."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{path} must be an integer, got {value!r}.")
    if value < 0:
        raise ValueError(f"{path} must be at least 0, got {value}.")
    return value


def _by_index(value: object, path: str) -> dict[int, Any]:
    """A JSON object whose keys are layers or heads, without repetition."""
    by_index: dict[int, Any] = {}
    for key, of_index in _mapping(value, path).items():
        if not (str(key).isascii() and str(key).isdecimal()):
            raise ValueError(f'the keys of {path} must be numbers such as "3", got {key!r}.')
        index = int(str(key))
        if index in by_index:
            raise ValueError(f"{path} names {index} twice, once as {key!r}; remove one.")
        by_index[index] = of_index
    return by_index


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; raises ValueError on equal keys, where `json.loads` keeps the last one."""
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        repeated = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {repeated!r} occurs twice in one object; remove one.")
    return found


def _mapping(value: object, path: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise TypeError(f"{path} must be a JSON object, got {value!r}.")
    return value


def _as_lists(points: Points) -> list[list[float]]:
    return [[step, tau] for step, tau in points]
