"""Scenes drawn as clips: signed distance functions with soft edges, in torch on any device.

Sizes are in units of the frame's shorter side and places in fractions of its width and height, so
a scene fits a frame of any shape. Motion is a function of the absolute frame, so a shorter clip
is the beginning of a longer one.
"""

import math
import random
from dataclasses import dataclass

import torch
from torch import Tensor

from xattn_video.pipelines.demo.grammar import BACKGROUNDS, COLOURS, Scene, SceneObject

# Motion runs its whole course over this many frames, after the first.
COURSE_FRAMES = 64
# The background fades from the top of the frame to its bottom: factor = TOP + FALL * y.
BACKGROUND_TOP, BACKGROUND_FALL = 1.05, -0.20
_OBJECT_SHADING = 0.12
# An object's edge fades over this share of the frame's shorter side, as through a lens.
_EDGE_WIDTH = 1 / 64


@dataclass(frozen=True, slots=True)
class Placement:
    """Position and size of an object at the start and the end of its course.

    Attributes:
        start: Centre (x, y) at frame 0, in fractions of the frame.
        end: Centre (x, y) at frame 64, likewise.
        start_radius: Radius at frame 0, in units of the frame's shorter side.
        end_radius: Radius at frame 64, likewise.
    """

    start: tuple[float, float]
    end: tuple[float, float]
    start_radius: float
    end_radius: float


def place_objects(scene: Scene, rng: random.Random | None = None) -> tuple[Placement, ...]:
    """A placement for every object: the whole frame, or one half each, upper first.

    Args:
        scene: The scene.
        rng: Varies size, position and travel a little; None takes the middle of each range.
    """
    if len(scene.objects) == 1:
        radius = _draw(rng, 0.20, 0.24)
        centre = (_draw(rng, 0.44, 0.56), _draw(rng, 0.44, 0.56))
        travel = (_draw(rng, 0.46, 0.52), _draw(rng, 0.46, 0.52))
        return (_place(scene.objects[0], centre, travel, radius, middle=(0.5, 0.5)),)
    placements = []
    for item, middle_y in zip(scene.objects, (0.25, 0.75), strict=True):
        radius = _draw(rng, 0.14, 0.155)
        centre = (_draw(rng, 0.38, 0.62), middle_y)
        travel = (_draw(rng, 0.48, 0.54), _draw(rng, 0.16, 0.18))
        placements.append(_place(item, centre, travel, radius, middle=(0.5, middle_y)))
    return tuple(placements)


def render_scene(
    scene: Scene,
    placements: tuple[Placement, ...],
    *,
    num_frames: int,
    height: int,
    width: int,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Draw a scene: float32 ``[3, num_frames, height, width]`` in [-1, 1]."""
    y = (torch.arange(height, device=device) + 0.5) / height
    x = (torch.arange(width, device=device) + 0.5) / width
    course = torch.arange(num_frames, device=device)[:, None, None] / COURSE_FRAMES
    unit = min(height, width)

    background = torch.tensor(BACKGROUNDS[scene.background], device=device)
    shading = BACKGROUND_TOP + BACKGROUND_FALL * y
    image = background[:, None, None, None] * shading[None, None, :, None]
    image = image.expand(3, num_frames, height, width)
    for item, placement in zip(scene.objects, placements, strict=True):
        centre_x, centre_y = (
            a + (b - a) * course for a, b in zip(placement.start, placement.end, strict=True)
        )
        radius = placement.start_radius + (placement.end_radius - placement.start_radius) * course
        offset_x = (x[None, None, :] - centre_x) * (width / unit)
        offset_y = (y[None, :, None] - centre_y) * (height / unit)
        distance = signed_distance(item.shape, offset_x, offset_y, radius)
        coverage = (0.5 - distance / _EDGE_WIDTH).clamp(0, 1)
        colour = torch.tensor(COLOURS[item.colour], device=device)[:, None, None, None]
        colour = colour * (1 - _OBJECT_SHADING * (offset_y / radius).clamp(-1, 1))
        image = image * (1 - coverage) + colour * coverage
    return image.clamp(0, 1) * 2 - 1


def signed_distance(shape: str, x: Tensor, y: Tensor, radius: Tensor) -> Tensor:
    """Distance to the outline of ``shape``, negative inside; y points down, the tip points up."""
    if shape == "circle":
        return torch.sqrt(x * x + y * y) - radius
    if shape == "ring":
        return (torch.sqrt(x * x + y * y) - radius * 0.8).abs() - radius * 0.21
    if shape == "square":
        return torch.maximum(x.abs(), y.abs()) - radius * 0.86
    if shape == "triangle":
        inner = radius * 0.6
        # Shifted so that the triangle's bounding box, not its centroid, is centred.
        lowered = y - radius * 0.3
        side = (math.sqrt(3) * x.abs() - lowered) * 0.5
        return torch.maximum(lowered, side) - inner
    raise ValueError(f"unknown shape {shape!r}; use circle, square, triangle or ring.")


def _draw(rng: random.Random | None, low: float, high: float) -> float:
    return (low + high) / 2 if rng is None else rng.uniform(low, high)


def _place(
    item: SceneObject,
    centre: tuple[float, float],
    travel: tuple[float, float],
    radius: float,
    *,
    middle: tuple[float, float],
) -> Placement:
    """The course of one object, centred on ``middle``."""
    if item.motion.startswith("moving"):
        left, right = middle[0] - travel[0] / 2, middle[0] + travel[0] / 2
        top, bottom = middle[1] - travel[1] / 2, middle[1] + travel[1] / 2
        start, end = {
            "moving left to right": ((left, centre[1]), (right, centre[1])),
            "moving right to left": ((right, centre[1]), (left, centre[1])),
            "moving top to bottom": ((centre[0], top), (centre[0], bottom)),
            "moving bottom to top": ((centre[0], bottom), (centre[0], top)),
        }[item.motion]
        return Placement(start, end, radius, radius)
    small, large = radius * 0.55, radius * 1.1
    if item.motion == "growing small to large":
        return Placement(centre, centre, small, large)
    return Placement(centre, centre, large, small)
