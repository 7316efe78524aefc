"""The methods of a comparison, its rows, and its plots."""

import json
from dataclasses import asdict

import pytest

from xattn_video.cli.compare_options import compared_prompts, parse_numbers
from xattn_video.measure.comparison import Measurement, judge_demo_clip
from xattn_video.measure.comparison_rows import MethodRow, summarise
from xattn_video.measure.methods import DENSE, method_of, sparse_methods
from xattn_video.measure.similarity import Similarity
from xattn_video.policy.presets import parse_setting


def test_the_demo_prompts_are_fixed_and_none_was_trained_on():
    from xattn_video.pipelines.demo import parse_prompt

    prompts = compared_prompts("demo", None, None, 40)
    assert len(set(prompts)) == 40
    assert prompts[:8] == compared_prompts("demo", None, None, 8)
    assert all(parse_prompt(prompt).is_held_out for prompt in prompts)
    with pytest.raises(ValueError, match="--demo-prompts must be at least 1, got 0"):
        compared_prompts("demo", None, None, 0)
    with pytest.raises(ValueError, match="--demo-prompts: there are 293 held-out scenes, got"):
        compared_prompts("demo", None, None, 1000)


def test_numbers_are_parsed():
    assert parse_numbers("0.9, 0.95", float, "--thresholds") == [0.9, 0.95]


def test_the_grid_names_every_setting_once():
    methods = sparse_methods({"stride": [8], "warmup_steps": [0, 5], "threshold": [0.9, 0.9]})
    assert [method.name for method in methods] == [
        "tau0.9-warmup0-stride8",
        "tau0.9-warmup5-stride8",
    ]


def test_shares_of_blocks_and_refreshes_are_part_of_the_grid():
    grid = {"warmup_steps": [5], "refresh_every": [0, 5], "threshold": [0.9], "density": [0.1]}
    methods = sparse_methods(grid)
    assert [method.label for method in methods] == [
        "tau 0.9, warm-up 5, stride 8",
        "density 0.1, warm-up 5, stride 8",
        "tau 0.9, warm-up 5, stride 8, refresh 5",
        "density 0.1, warm-up 5, stride 8, refresh 5",
    ]
    assert [method.sparse.refresh_every for method in methods] == [None, None, 5, 5]


def measurement(method, prompt: str, passed: list[bool], **values) -> Measurement:
    base = dict.fromkeys(Measurement.__dataclass_fields__)
    base |= {"method": method, "prompt": prompt, "seed": 0, "seconds": 2.0, "backends": ()}
    return Measurement(**base | {"attributes": {"shape": passed}} | values)


def test_the_share_of_prompts_still_followed():
    """Of those that dense attention follows; and the share of all that are followed."""
    (sparse,) = sparse_methods({"threshold": [0.9], "warmup_steps": [0]})
    similarity = Similarity(30, 0.9, 29, 9, 0)
    rows = summarise(
        [
            measurement(DENSE, "a", [True, True]),
            measurement(DENSE, "b", [True]),
            measurement(DENSE, "c", [False]),
            measurement(sparse, "a", [True, False], similarity=similarity, seconds=1.0),
            measurement(sparse, "b", [True], similarity=similarity, seconds=1.0),
            measurement(sparse, "c", [True], similarity=similarity, seconds=1.0),
        ]
    )
    dense, row = rows
    assert (dense.followed, dense.still_followed) == (pytest.approx(2 / 3), None)
    assert row.followed == pytest.approx(2 / 3)
    assert row.still_followed == 0.5
    assert row.checks_right == 0.75
    assert row.speedup == 2
    assert MethodRow.from_dict(json.loads(json.dumps(asdict(row)))) == row


def test_a_step_is_as_many_times_faster_as_its_median_is_smaller():
    (sparse,) = sparse_methods({"threshold": [0.9], "warmup_steps": [0]})
    dense_steps = [
        measurement(DENSE, p, [], dense_step_seconds=s) for p, s in [("a", 6), ("b", 8)]
    ]
    sparse_steps = [
        measurement(sparse, p, [], dense_step_seconds=99.0, sparse_step_seconds=s)
        for p, s in [("a", 1), ("b", 3)]
    ]
    dense, row = summarise(dense_steps + sparse_steps)
    assert row.step_speedup == 7 / 2
    assert dense.step_speedup is None


def test_the_demo_models_clips_are_judged_from_their_pixels():
    from xattn_video.measure.clips import Clip
    from xattn_video.pipelines.demo import parse_prompt
    from xattn_video.pipelines.demo.rendering import place_objects, render_scene

    prompt = "a red circle moving left to right over a blue background"
    scene = parse_prompt(prompt)
    drawn = render_scene(scene, place_objects(scene), num_frames=17, height=64, width=64)
    frames = ((drawn + 1) * 127.5).round().byte().permute(1, 2, 3, 0).numpy()
    judged = judge_demo_clip(prompt, Clip(frames, 24))
    assert judged is not None
    assert judged["colour"] == [True]
    assert judge_demo_clip(prompt.replace("red", "green"), Clip(frames, 24))["colour"] == [False]
    assert judge_demo_clip("a cat", Clip(frames, 24)) is None


@pytest.mark.parametrize(
    ("settings", "label"),
    [
        (["threshold=0.9"], "density of the sparse steps (kept / valid blocks)"),
        (
            ["threshold=0.9", "density=0.1,refresh_every=5"],
            "budget: density with refreshes counted as 1 (kept / valid blocks)",
        ),
    ],
)
def test_the_axis_of_a_plot_says_whether_refreshes_count(settings, label, monkeypatch, tmp_path):
    from xattn_video.measure import comparison_plots

    drawn = []
    monkeypatch.setattr(comparison_plots, "write_figure", lambda _, made: drawn.append(made))
    methods = [method_of(parse_setting(text)) for text in settings]
    empty = dict.fromkeys(MethodRow.__dataclass_fields__) | {"num_videos": 1, "identical": False}
    measured = empty | {"psnr": 40.0, "density": 0.3}
    rows = [MethodRow(**measured | {"method": method}) for method in methods]
    comparison_plots.write_plots(tmp_path / "plot", rows, {})
    assert drawn[0].axes[0].get_xlabel() == label


def test_the_plot_of_densities_spreads_its_colours(monkeypatch, tmp_path):
    from xattn_video.measure import comparison_plots

    drawn = {}
    monkeypatch.setattr(
        comparison_plots, "write_figure", lambda path, made: drawn.update({path: made})
    )
    method = sparse_methods({"threshold": [0.9]}, warmup_steps=1)[0]
    values = dict.fromkeys(MethodRow.__dataclass_fields__) | {"method": method, "num_videos": 1}
    row = MethodRow(**values | {"identical": False, "psnr": 40.0, "density": 0.65})
    grid = [[None, 0.63, 0.71]]
    paths = comparison_plots.write_plots(tmp_path / "plot", [row], {method.name: grid})
    (image,) = drawn[paths[-1]].axes[0].images
    assert image.get_clim() == pytest.approx((0.6, 0.8))
