"""The demo checker measures rendered clips rightly, sharp and blurred, and sees what is wrong."""

import json
import random
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from xattn_video.measure.demo_checks import ATTRIBUTES, OUTLINE, measure_clip, score_clip
from xattn_video.pipelines.demo.grammar import Scene, parse_prompt, sample_scene
from xattn_video.pipelines.demo.rendering import place_objects, render_scene

ROOT = Path(__file__).parents[1]
CHECKS = sorted((ROOT / "benchmarks/results/demo_check").glob("*.json"))


def _frames(scene: Scene, rng: random.Random | None = None, size: int = 128) -> Tensor:
    clip = render_scene(scene, place_objects(scene, rng), num_frames=65, height=size, width=size)
    return (clip / 2 + 0.5).transpose(0, 1)


def _blurred(frames: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(frames.shape, generator=generator)
    soft = F.avg_pool2d(frames, 5, stride=1, padding=2, count_include_pad=False)
    return (soft + 0.03 * noise).clamp(0, 1)


@pytest.mark.parametrize("blurred", [False, True])
def test_rendered_clips_are_right_in_every_attribute(blurred: bool) -> None:
    rng = random.Random(0)
    # A blur as wide as a small object rounds its corners.
    names = ATTRIBUTES if blurred else (*ATTRIBUTES, OUTLINE)
    right: dict[str, list[bool]] = {name: [] for name in names}
    for index in range(16):
        scene = sample_scene(rng, 1 + index % 2)
        frames = _frames(scene, rng)
        score = score_clip(_blurred(frames) if blurred else frames, scene)
        for name in names:
            right[name] += score[name]
    shares = {name: sum(values) / len(values) for name, values in right.items()}
    assert shares == dict.fromkeys(names, 1.0)


@pytest.mark.parametrize(
    ("shown", "wrong"),
    [
        ("a red square moving left to right over a gray background", {"shape"}),
        ("a cyan ring moving left to right over a gray background", {"colour"}),
        ("a red ring moving right to left over a gray background", {"motion", "start"}),
        ("a red ring moving left to right over a pink background", {"background"}),
    ],
)
def test_what_differs_from_the_prompt_is_wrong(shown: str, wrong: set[str]) -> None:
    asked = parse_prompt("a red ring moving left to right over a gray background")
    score = score_clip(_frames(parse_prompt(shown)), asked)
    assert {name for name in ATTRIBUTES if not all(score[name])} == wrong


@pytest.mark.parametrize("shape", ["circle", "square", "triangle"])
def test_a_dent_is_seen_though_the_shape_is_still_told(shape: str) -> None:
    scene = parse_prompt(f"a green {shape} growing small to large on a black background")
    frames = _frames(scene)
    rows, columns = torch.meshgrid(torch.arange(128), torch.arange(128), indexing="ij")
    for frame in frames[16:48]:
        inside = frame[1] > 0.4
        right = columns[inside].max()
        middle = rows[inside & (columns == right)].float().mean()
        radius = 0.3 * inside.sum().sqrt()
        bite = (rows - middle) ** 2 + (columns - right) ** 2 < radius**2
        frame[:, bite] = frame[:, :, :1].expand_as(frame)[:, bite]
    score = score_clip(frames, scene)
    assert {name for name, right in score.items() if not all(right)} == {OUTLINE}


def test_a_missing_object_is_wrong_in_all_its_attributes() -> None:
    asked = parse_prompt(
        "a red ring moving left to right and a green circle moving left to right over a gray "
        "background"
    )
    empty = torch.full((65, 3, 64, 64), 0.5)
    score = score_clip(empty, asked)
    assert score["background"] == [True]
    assert score["number"] == [False]
    assert score["shape"] == score["motion"] == score["colour"] == [False, False]


def test_a_still_object_does_not_move() -> None:
    scene = parse_prompt("a red circle moving left to right over a gray background")
    frames = _frames(scene)[:1].expand(65, -1, -1, -1)
    found = measure_clip(frames, num_objects=1).objects[0]
    assert found is not None
    assert found.motion == "still"


def test_frames_of_another_layout_are_refused() -> None:
    with pytest.raises(ValueError, match=r"frames must be \[T, 3, H, W\], got \(65, 64, 64, 3\)"):
        measure_clip(torch.zeros(65, 64, 64, 3), num_objects=1)


@pytest.mark.parametrize("path", CHECKS, ids=lambda path: path.stem)
def test_the_page_shows_the_shares_that_were_measured(path: Path) -> None:
    shares = json.loads(path.read_text())["shares"]
    cells = [f"{shares[name]['share']:.0%}" for name in ATTRIBUTES]
    assert f" | {' | '.join(cells)} |" in (ROOT / "docs/demo_model.md").read_text()


@pytest.mark.parametrize("run", ["dense", "sparse"])
def test_the_demo_model_met_the_goals(run: str) -> None:
    from scripts.check_demo_model import GOALS

    shares = json.loads((ROOT / f"benchmarks/results/demo_check/{run}.json").read_text())["shares"]
    assert all(shares[name]["share"] >= goal for name, goal in GOALS.items())
