"""Measures what a clip shows from its pixels, and compares that with the prompt."""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from xattn_video.pipelines.demo.grammar import BACKGROUNDS, COLOURS, MOTIONS, SHAPES, Scene
from xattn_video.pipelines.demo.rendering import (
    BACKGROUND_FALL,
    BACKGROUND_TOP,
    COURSE_FRAMES,
    Placement,
    place_objects,
    signed_distance,
)

ATTRIBUTES = ("background", "number", "colour", "start", "motion", "shape")
OUTLINE = "outline"
"""A check that no prompt mentions: whether the objects keep their shape in every frame."""

# Frames are reduced to about this many pixels on the shorter side.
_WORKING_SIDE = 128
_SAMPLED_FRAMES = 9
# An object differs from the background by at least this much in RGB, and fills at least this part
# of a square on the frame's shorter side.
_MIN_DISTANCE = 0.2
_MIN_AREA = 0.004
# A start is right within this distance of the nominal one, a window one third wide.
_START_TOLERANCE = 1 / 6
# Least intersection over union with the ideal outline, in the worst frame. Of 25 objects in dense
# videos of 20 held-out prompts (33 frames, 15 steps) 22 have more; dented ones have less.
_WHOLE_OUTLINE = 0.86


@dataclass(frozen=True, slots=True)
class ObjectMeasurement:
    """One object of a clip.

    Attributes:
        colour: The nearest of the grammar's colours.
        start: Centre (x, y) in the first frame, in fractions of the frame; None if it is absent.
        motion: The nearest of the grammar's motions, or "still".
        shape: The shape whose outline fits best.
        shape_fit: Intersection over union with that outline.
        worst_fit: The same in the worst frame.
    """

    colour: str
    start: tuple[float, float] | None
    motion: str
    shape: str
    shape_fit: float
    worst_fit: float


@dataclass(frozen=True, slots=True)
class ClipMeasurement:
    """A clip: its background, the number of objects, and the measured objects or None."""

    background: str
    number: int
    objects: tuple[ObjectMeasurement | None, ...]


@dataclass(frozen=True, slots=True)
class _Region:
    """A connected region that differs from the background, in one frame."""

    frame: int
    mask: Tensor
    centre: tuple[float, float]
    area: float
    colour: Tensor


def score_clip(frames: Tensor, scene: Scene) -> dict[str, list[bool]]:
    """Whether a clip shows its scene; see `measure_clip` and `score_measurement`."""
    return score_measurement(measure_clip(frames, num_objects=len(scene.objects)), scene)


def score_measurement(seen: ClipMeasurement, scene: Scene) -> dict[str, list[bool]]:
    """Whether each of `ATTRIBUTES` and `OUTLINE` is right.

    Background and number are checked once per clip, the others once per object of the scene. A
    missing object is wrong in all of them.
    """
    pairs = list(zip(scene.objects, seen.objects, strict=True))
    starts = zip(seen.objects, place_objects(scene), strict=True)
    return {
        "background": [seen.background == scene.background],
        "number": [seen.number == len(scene.objects)],
        "colour": [found is not None and found.colour == item.colour for item, found in pairs],
        "start": [_starts_at(found, placement) for found, placement in starts],
        "motion": [found is not None and found.motion == item.motion for item, found in pairs],
        "shape": [found is not None and found.shape == item.shape for item, found in pairs],
        OUTLINE: [
            found is not None and found.worst_fit >= _WHOLE_OUTLINE for found in seen.objects
        ],
    }


def measure_clip(frames: Tensor, *, num_objects: int) -> ClipMeasurement:
    """Measure what a clip shows.

    Args:
        frames: ``[T, 3, H, W]``, floating-point in [0, 1] or uint8.
        num_objects: With one object the largest region is followed; with two the largest region
            of the upper and of the lower half.

    Raises:
        ValueError: The frames have another shape.
    """
    if frames.ndim != 4 or frames.shape[1] != 3:
        raise ValueError(
            f"frames must be [T, 3, H, W], got {tuple(frames.shape)}; "
            "take the pipeline's frames[0] with output_type='pt'."
        )
    indices = torch.linspace(0, len(frames) - 1, min(_SAMPLED_FRAMES, len(frames)))
    chosen = indices.round().long()
    frames_seen = frames[chosen].float().cpu()
    if frames.dtype == torch.uint8:
        frames_seen = frames_seen / 255
    frames_seen = _working_size(frames_seen)
    background, name = _measure_background(frames_seen)
    # [F, H, W]
    distances = (frames_seen - background).norm(dim=1)
    labels = _label(distances > _MIN_DISTANCE)
    regions = [
        _find_regions(int(index), frame, distance, labelled)
        for index, frame, distance, labelled in zip(
            chosen, frames_seen, distances, labels, strict=True
        )
    ]
    number = int(torch.tensor([len(found) for found in regions]).median())
    course = (len(frames) - 1) / COURSE_FRAMES
    objects = tuple(
        _measure_object(_follow(regions, slot, num_objects), course, num_objects)
        for slot in range(num_objects)
    )
    return ClipMeasurement(name, number, objects)


def _working_size(frames: Tensor) -> Tensor:
    factor = max(1, min(frames.shape[2:]) // _WORKING_SIDE)
    return F.avg_pool2d(frames, factor)


def _shading(height: int) -> Tensor:
    """The brightness factor of the background in each row, `[H]`."""
    return BACKGROUND_TOP + BACKGROUND_FALL * (torch.arange(height) + 0.5) / height


def _measure_background(frames: Tensor) -> tuple[Tensor, str]:
    """Colour of the background in each row, `[3, H, 1]`, and its name, from the frames' border."""
    height, width = frames.shape[2:]
    margin = max(1, min(height, width) // 16)
    border = torch.zeros(height, width, dtype=torch.bool)
    border[:margin] = border[-margin:] = True
    border[:, :margin] = border[:, -margin:] = True
    shading = _shading(height)[:, None]
    flat = frames / shading
    colour = flat[..., border].transpose(0, 1).flatten(1).median(dim=1).values
    return colour[:, None, None] * shading, _nearest(colour, BACKGROUNDS)


def _nearest(colour: Tensor, names: dict[str, tuple[float, float, float]]) -> str:
    return min(names, key=lambda name: float((colour - torch.tensor(names[name])).norm()))


def _find_regions(index: int, frame: Tensor, distance: Tensor, labels: Tensor) -> list[_Region]:
    """The regions of a frame ``[3, H, W]`` that are not background, the largest first."""
    height, width = frame.shape[1:]
    unit = min(height, width)
    regions = []
    for label, size in zip(*labels.unique(return_counts=True), strict=True):
        if label == 0 or size < _MIN_AREA * unit**2:
            continue
        inside = labels == label
        # The outline is where the colour is halfway between object and background.
        plain = distance[inside].quantile(0.75)
        mask = inside & (distance > 0.5 * plain)
        rows, columns = mask.nonzero().float().unbind(1)
        centre = (float(columns.mean() + 0.5) / width, float(rows.mean() + 0.5) / height)
        colour = frame[:, inside & (distance > 0.85 * plain)].median(dim=1).values
        regions.append(_Region(index, mask, centre, float(mask.sum()) / unit**2, colour))
    return sorted(regions, key=lambda region: -region.area)


def _label(masks: Tensor) -> Tensor:
    """Connected regions of each mask, ``[F, H, W]``, each with one number: its largest index."""
    size = masks[0].numel()
    labels = torch.arange(1, size + 1, dtype=torch.float32).view(masks.shape[1:]) * masks
    while True:
        spread = F.max_pool2d(labels, 3, stride=1, padding=1) * masks
        if torch.equal(spread, labels):
            return labels.long()
        labels = spread


def _follow(regions: Sequence[Sequence[_Region]], slot: int, num_objects: int) -> list[_Region]:
    """The region of one object in each frame, without frames that lack it."""
    track: list[_Region] = []
    for found in regions:
        if num_objects == 2:
            found = [region for region in found if (region.centre[1] > 0.5) == (slot == 1)]
        track += found[:1]
    return track


def _measure_object(
    track: Sequence[_Region], course: float, num_objects: int
) -> ObjectMeasurement | None:
    if not track:
        return None
    colour = torch.stack([region.colour for region in track]).median(dim=0).values
    shape, fit = _measure_shape(track)
    return ObjectMeasurement(
        colour=_nearest(colour, COLOURS),
        start=track[0].centre if track[0].frame == 0 else None,
        motion=_measure_motion(track, course, num_objects),
        shape=shape,
        shape_fit=fit,
        worst_fit=min(_outline_fit(region.mask, shape) for region in track),
    )


def _measure_motion(track: Sequence[_Region], course: float, num_objects: int) -> str:
    """The motion with travel and growth over the clip nearest to the measured ones."""
    if len(track) < 3:
        return "still"
    time = torch.tensor([float(region.frame) for region in track])
    time = time - time.mean()
    values = torch.tensor([(*region.centre, 0.5 * math.log(region.area)) for region in track])
    slope = (time[:, None] * (values - values.mean(0))).sum(0) / time.square().sum()
    travel_y = 0.49 if num_objects == 1 else 0.17
    typical = torch.tensor([0.49, travel_y, math.log(2)])
    change = slope * COURSE_FRAMES * min(course, 1.0) / typical
    expected = {
        "moving left to right": (1.0, 0.0, 0.0),
        "moving right to left": (-1.0, 0.0, 0.0),
        "moving top to bottom": (0.0, 1.0, 0.0),
        "moving bottom to top": (0.0, -1.0, 0.0),
        "growing small to large": (0.0, 0.0, 1.0),
        "shrinking large to small": (0.0, 0.0, -1.0),
        "still": (0.0, 0.0, 0.0),
    }
    assert set(expected) == {*MOTIONS, "still"}
    return min(
        expected,
        key=lambda name: float((change - course * torch.tensor(expected[name])).norm()),
    )


def _measure_shape(track: Sequence[_Region]) -> tuple[str, float]:
    """The shape whose outline fits best, at equal area and centroid, and how well it fits."""
    areas = sorted(region.area for region in track)
    large = [region for region in track if region.area >= areas[len(areas) // 2]]
    fits = {
        shape: sum(_outline_fit(region.mask, shape) for region in large) / len(large)
        for shape in SHAPES
    }
    best = max(fits, key=lambda shape: fits[shape])
    return best, round(fits[best], 4)


def _outline_fit(mask: Tensor, shape: str) -> float:
    """Intersection over union of ``mask`` with ``shape`` of its area and centroid."""
    unit_area, offset = _unit_outline(shape)
    rows, columns = mask.nonzero().float().unbind(1)
    radius = torch.sqrt(mask.sum() / unit_area)
    y = torch.arange(mask.shape[0])[:, None] - (rows.mean() - offset * radius)
    x = torch.arange(mask.shape[1])[None, :] - columns.mean()
    outline = signed_distance(shape, x, y, radius) <= 0
    return float((mask & outline).sum() / (mask | outline).sum())


@functools.cache
def _unit_outline(shape: str) -> tuple[float, float]:
    """Area of a shape of radius 1, and its centroid's y."""
    axis = torch.linspace(-1.5, 1.5, 601)
    inside = signed_distance(shape, axis[None, :], axis[:, None], torch.tensor(1.0)) <= 0
    area = float(inside.sum()) * float(axis[1] - axis[0]) ** 2
    return area, float((axis[:, None] * inside).sum() / inside.sum())


def _starts_at(found: ObjectMeasurement | None, placement: Placement) -> bool:
    if found is None or found.start is None:
        return False
    return all(
        abs(measured - nominal) <= _START_TOLERANCE
        for measured, nominal in zip(found.start, placement.start, strict=True)
    )
