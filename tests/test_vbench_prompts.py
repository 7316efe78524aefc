"""VBench's lists and constants."""

import hashlib
import re

import pytest

from eval_vbench.dimensions import DATA, dimensions, totals
from eval_vbench.launch import Share
from eval_vbench.prompts import choose_prompts, load_suite, video_items
from xattn_video.pipelines.demo import parse_prompt

PROMPTS_OF_DIMENSION = {
    "subject_consistency": 72,
    "background_consistency": 86,
    "temporal_flickering": 75,
    "motion_smoothness": 72,
    "dynamic_degree": 72,
    "aesthetic_quality": 93,
    "imaging_quality": 93,
    "object_class": 79,
    "multiple_objects": 82,
    "human_action": 100,
    "color": 85,
    "spatial_relationship": 84,
    "scene": 86,
    "appearance_style": 90,
    "temporal_style": 100,
    "overall_consistency": 93,
}


def test_the_data_are_vbenchs_own():
    stated = re.findall(r"`(\S+)` \|.*`([0-9a-f]{64})`", (DATA / "README.md").read_text())
    assert len(stated) == 4
    for name, digest in stated:
        assert hashlib.sha256((DATA / name).read_bytes()).hexdigest() == digest, name


@pytest.mark.parametrize("suite", ["gpt_enhanced", "hunyuan", "original"])
def test_a_suite_holds_every_entry_once(suite):
    prompts = load_suite(suite)
    assert len(prompts) == 944
    assert sum(len(prompt.entries) for prompt in prompts) == 946
    assert [prompt.index for prompt in prompts] == list(range(944))
    counts = dict.fromkeys(dimensions(), 0)
    for prompt in prompts:
        for entry in prompt.entries:
            assert entry["prompt_en"] == prompt.name
            for dimension in entry["dimension"]:
                counts[dimension] += 1
    assert counts == PROMPTS_OF_DIMENSION


def test_the_model_is_given_the_wording_and_files_the_original():
    long, short = load_suite("gpt_enhanced")[0], load_suite("original")[0]
    assert long.name == short.name == short.text == "In a still frame, a stop sign"
    assert long.text.startswith("In a still frame, a weathered stop sign stands prominently")
    assert video_items([long], 1, 0)[0].file_name == "In a still frame, a stop sign-0.mp4"


def test_every_file_name_is_one_that_vbench_and_a_disk_can_read():
    items = video_items(load_suite("original"), 5, 0)
    names = {item.file_name for item in items}
    assert len(names) == len(items) == 4720
    for item in items:
        assert "/" not in item.file_name
        assert len(item.file_name.encode()) <= 255
        assert re.sub(r"-\d+$", "", item.file_name.removesuffix(".mp4")) == item.prompt.name


def test_a_seed_depends_on_the_video_alone():
    whole = {item.key: item.seed for item in video_items(load_suite("original"), 5, 7)}
    part = {item.key: item.seed for item in video_items(choose_prompts("original", 30), 1, 7)}
    assert part.items() <= whole.items()
    assert len(set(whole.values())) == len(whole)


def test_a_part_of_the_suite_reaches_every_dimension():
    prompts = choose_prompts("gpt_enhanced", 32)
    reached = {name for prompt in prompts for e in prompt.entries for name in e["dimension"]}
    assert reached == set(dimensions())


def test_the_demo_suite_is_in_the_demo_models_grammar():
    prompts = load_suite("demo")
    assert len({prompt.name for prompt in prompts}) == len(prompts) == 40
    scenes = [parse_prompt(prompt.text) for prompt in prompts]
    assert all(scene.is_held_out for scene in scenes)
    assert choose_prompts("demo", 4) == prompts[:4]


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 8])
def test_the_shares_are_the_whole(num_ranks):
    items = list(range(101))
    shares = [Share(rank, num_ranks).of(items) for rank in range(num_ranks)]
    assert sorted(item for share in shares for item in share) == items


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: load_suite("long"), r"suite must be one of gpt_enhanced, .*, got 'long'"),
        (
            lambda: choose_prompts("original", 945),
            r"num_prompts must lie between 1 and 944 for suite 'original', got 945",
        ),
        (lambda: choose_prompts("demo", 0), r"between 1 and 40 for suite 'demo', got 0"),
        (
            lambda: video_items([], 2, 0),
            r"videos_per_prompt must be 1 \(a reduced run\) or 5 \(VBench's\), got 2",
        ),
    ],
)
def test_what_is_not_there_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_totals_are_vbenchs():
    lowest = {name: dimension.lowest for name, dimension in dimensions().items()}
    highest = {name: dimension.highest for name, dimension in dimensions().items()}
    for scores, value in ((lowest, 0.0), (highest, 1.0)):
        found = totals(scores)
        assert (found.quality, found.semantic, found.total) == pytest.approx((value,) * 3)
    # Half the weight of another: dynamic degree moves Quality by 0.5 of 6.5, Total by 4/5 of that.
    found = totals(highest | {"dynamic_degree": 0.0})
    assert found.quality == pytest.approx(6 / 6.5)
    assert found.total == pytest.approx((4 * 6 / 6.5 + 1) / 5)


def test_there_are_no_totals_of_fifteen_dimensions():
    scores = dict.fromkeys(list(dimensions())[1:], 0.5)
    assert totals(scores) is None
