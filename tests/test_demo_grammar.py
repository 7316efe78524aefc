"""The demo model's language: prompts and scenes, and what training never sees."""

import random

import pytest

from xattn_video.pipelines.demo.grammar import (
    Scene,
    SceneObject,
    combinations,
    held_out_scenes,
    is_held_out,
    parse_prompt,
    sample_scene,
)


@pytest.mark.parametrize("num_objects", [1, 2])
def test_a_prompt_names_its_scene(num_objects: int) -> None:
    rng = random.Random(0)
    for _ in range(200):
        scene = sample_scene(rng, num_objects)
        assert parse_prompt(scene.prompt) == scene


def test_the_documented_prompt_is_in_the_grammar_and_trained_on() -> None:
    scene = parse_prompt("a red circle moving left to right over a blue background")
    circle = SceneObject(shape="circle", colour="red", motion="moving left to right")
    assert scene == Scene((circle,), "blue", "over")
    assert scene.is_trainable


@pytest.mark.parametrize("num_objects", [1, 2])
def test_prompts_of_a_kind_have_one_number_of_words(num_objects: int) -> None:
    rng = random.Random(1)
    scenes = [sample_scene(rng, num_objects) for _ in range(200)]
    assert len({len(scene.prompt.split()) for scene in scenes}) == 1


@pytest.mark.parametrize("num_objects", [1, 2])
def test_training_and_held_out_scenes_share_no_combination(num_objects: int) -> None:
    rng = random.Random(2)
    for held_out in (False, True):
        for _ in range(100):
            scene = sample_scene(rng, num_objects, held_out=held_out)
            assert all(is_held_out(item, scene.background) is held_out for item in scene.objects)


def test_about_a_tenth_of_the_combinations_is_held_out() -> None:
    known = combinations()
    share = sum(is_held_out(item, background) for item, background in known) / len(known)
    assert 0.08 <= share <= 0.12


def test_as_many_held_out_scenes_as_there_are_can_be_had() -> None:
    scenes = held_out_scenes(293)
    assert len(set(scenes)) == 293
    assert all(scene.is_held_out for scene in scenes)
    assert scenes[:40] == held_out_scenes(40)


def test_more_held_out_scenes_than_there_are_are_refused() -> None:
    with pytest.raises(ValueError, match=r"there are 293 held-out scenes, got count=294; ask for"):
        held_out_scenes(294)


def test_two_objects_differ_in_colour() -> None:
    rng = random.Random(3)
    for _ in range(100):
        first, second = sample_scene(rng, 2).objects
        assert first.colour != second.colour


@pytest.mark.parametrize(
    "prompt",
    [
        "a cat",
        "a red circle over a blue background",
        "a red circle moving left to right over a blue background and a green ring",
        "",
    ],
)
def test_a_prompt_outside_the_grammar_is_refused(prompt: str) -> None:
    with pytest.raises(ValueError, match="not in the demo model's grammar, got"):
        parse_prompt(prompt)


def test_an_unknown_colour_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match="unknown colour 'mauve'; use one of red, green"):
        SceneObject(shape="circle", colour="mauve", motion="moving left to right")


def test_three_objects_are_refused() -> None:
    item = SceneObject(shape="circle", colour="red", motion="moving left to right")
    with pytest.raises(ValueError, match="one or two objects, got 3"):
        Scene((item,) * 3, "blue")
