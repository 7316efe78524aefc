"""Rendered scenes: sizes, ranges, and motion that depends on the absolute frame."""

import random

import pytest
import torch
from torch import Tensor

from xattn_video.pipelines.demo.grammar import SHAPES, parse_prompt, sample_scene
from xattn_video.pipelines.demo.rendering import place_objects, render_scene, signed_distance

PROMPT = "a red circle moving left to right over a blue background"


def _render(prompt: str, num_frames: int, height: int, width: int) -> Tensor:
    scene = parse_prompt(prompt)
    return render_scene(
        scene, place_objects(scene), num_frames=num_frames, height=height, width=width
    )


@pytest.mark.parametrize(("height", "width"), [(64, 64), (32, 128), (128, 32)])
def test_a_clip_has_the_size_asked_for_and_values_in_range(height: int, width: int) -> None:
    clip = _render(PROMPT, 9, height, width)
    assert clip.shape == (3, 9, height, width)
    assert clip.dtype == torch.float32
    assert clip.min() >= -1
    assert clip.max() <= 1


def test_a_shorter_clip_is_the_beginning_of_a_longer_one() -> None:
    assert torch.equal(_render(PROMPT, 17, 48, 48), _render(PROMPT, 65, 48, 48)[:, :17])


@pytest.mark.parametrize(("height", "width"), [(64, 64), (64, 128)])
def test_a_circle_is_round_in_every_frame_shape(height: int, width: int) -> None:
    clip = _render("a white circle growing small to large over a black background", 1, 64, width)
    inside = clip[0, 0] > 0
    assert inside.any(0).sum() == inside.any(1).sum()


def test_two_objects_never_touch() -> None:
    rng = random.Random(0)
    for _ in range(50):
        upper, lower = place_objects(sample_scene(rng, 2), rng)
        for y_upper, y_lower, reach in (
            (upper.start[1], lower.start[1], upper.start_radius + lower.start_radius),
            (upper.end[1], lower.end[1], upper.end_radius + lower.end_radius),
            (upper.end[1], lower.start[1], upper.end_radius + lower.start_radius),
            (upper.start[1], lower.end[1], upper.start_radius + lower.end_radius),
        ):
            assert y_lower - y_upper > reach


def test_only_the_ring_is_hollow() -> None:
    centre = torch.zeros(1)
    inside = {
        shape: bool(signed_distance(shape, centre, centre, centre + 1) < 0) for shape in SHAPES
    }
    assert inside == {"circle": True, "square": True, "triangle": True, "ring": False}
