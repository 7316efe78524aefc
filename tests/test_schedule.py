import json
import pickle

import numpy as np
import pytest
import torch

from xattn_video import ThresholdSchedule


def taus(schedule, *steps):
    return [round(schedule.threshold(step), 6) for step in steps]


def test_a_constant_holds_at_every_step():
    assert taus(ThresholdSchedule.constant(0.9), 0, 7, 1000) == [0.9, 0.9, 0.9]


def test_a_linear_ramp_reaches_its_end_at_the_last_step():
    schedule = ThresholdSchedule.linear(1.0, 0.8, 5)
    assert taus(schedule, 0, 1, 4, 50) == [1.0, 0.95, 0.8, 0.8]


def test_a_cosine_ramp_is_flat_at_both_ends():
    schedule = ThresholdSchedule.cosine(1.0, 0.8, 11)
    assert taus(schedule, 0, 5, 10, 11) == [1.0, 0.9, 0.8, 0.8]
    assert 1.0 - schedule.threshold(1) < 0.02 / 2


def test_a_mapping_holds_each_value_until_the_next():
    schedule = ThresholdSchedule.piecewise({10: 0.9, 5: 0.95})
    assert taus(schedule, 0, 5, 9, 10, 60) == [0.95, 0.95, 0.95, 0.9, 0.9]


def test_the_last_entry_of_a_list_holds():
    assert taus(ThresholdSchedule.from_list([1, 0.9, 0.8]), 0, 1, 2, 9) == [1.0, 0.9, 0.8, 0.8]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (0.9, [0.9, 0.9]),
        (1, [1.0, 1.0]),
        ([0.9, 0.8], [0.9, 0.8]),
        ((0.9,), [0.9, 0.9]),
        ({1: 0.7, 0: 0.8}, [0.8, 0.7]),
        (lambda step: 0.9 - step / 10, [0.9, 0.8]),
        (ThresholdSchedule.constant(0.6), [0.6, 0.6]),
    ],
)
def test_whatever_says_a_schedule_becomes_one(value, expected):
    assert taus(ThresholdSchedule.coerce(value), 0, 1) == expected


def test_layers_and_heads_have_values_of_their_own():
    schedule = ThresholdSchedule(
        ((0, 0.95),), layers={1: ((0, 0.9),)}, heads={(1, 0): ((0, 0.8), (5, 0.7))}
    )
    assert not schedule.is_uniform
    assert schedule.per_head(0, 2, 2) == [[0.95, 0.95], [0.8, 0.9]]
    assert schedule.per_head(5, 2, 2) == [[0.95, 0.95], [0.7, 0.9]]
    assert schedule.threshold(0) == 0.95
    assert schedule.threshold(0, layer=1) == 0.9


def test_a_layer_that_the_model_lacks_is_refused():
    schedule = ThresholdSchedule(((0, 0.95),), layers={60: ((0, 0.9),)})
    with pytest.raises(ValueError, match="layer 60, but the model has 60 layers, 0 to 59"):
        schedule.per_head(0, 60, 24)
    schedule = ThresholdSchedule(((0, 0.95),), heads={(0, 24): ((0, 0.9),)})
    with pytest.raises(ValueError, match="head 24 of layer 0, but a layer has 24 heads"):
        schedule.per_head(0, 60, 24)


def test_a_file_gives_back_what_was_saved(tmp_path):
    schedule = ThresholdSchedule(
        ((0, 1.0), (9, 0.8)),
        "cosine",
        {3: ((0, 0.9),)},
        {(3, 1): ((0, 0.7),), (4, 0): ((2, 0.6),)},
    )
    schedule.save(tmp_path / "plan.json")
    assert ThresholdSchedule.load(tmp_path / "plan.json") == schedule
    assert pickle.loads(pickle.dumps(schedule)) == schedule


def test_a_file_needs_its_points_alone(tmp_path):
    (tmp_path / "plan.json").write_text('{"points": [[0, 0.9]]}')
    assert ThresholdSchedule.load(tmp_path / "plan.json") == ThresholdSchedule.constant(0.9)


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        ({"points": [[0, 0.9]], "layer": {}}, ValueError, "unknown key 'layer'"),
        ({}, ValueError, 'has no "points"'),
        ([0.9], TypeError, "must be a JSON object"),
        ({"points": 0.9}, TypeError, "points must be a list of"),
        ({"points": []}, TypeError, "points must be a list of"),
        ({"points": [[0, 0.9, 1]]}, TypeError, r"points\[0\] must be a \[step, threshold\] pair"),
        ({"points": [5]}, TypeError, r"points\[0\] must be a \[step, threshold\] pair, got 5"),
        ({"points": ["09"]}, TypeError, r"points\[0\] must be a \[step, threshold\] pair"),
        ({"points": [[0, "high"]]}, TypeError, r"points\[0\]\[1\] must be a number"),
        ({"points": [[0.5, 0.9]]}, TypeError, r"points\[0\]\[0\] must be an integer"),
        ({"points": [[-1, 0.9]]}, ValueError, r"points\[0\]\[0\] must be at least 0"),
        ({"points": [[0, 1.5]]}, ValueError, r"points\[0\]\[1\] must lie in \(0, 1\], got 1.5"),
        ({"points": [[5, 0.9], [5, 0.8]]}, ValueError, r"points\[1\]\[0\]: steps must ascend"),
        ({"points": [[0, 0.9]], "interpolation": "cubic"}, ValueError, "interpolation must be"),
        ({"points": [[0, 0.9]], "layers": [1]}, TypeError, "layers must be a JSON object"),
        (
            {"points": [[0, 0.9]], "layers": {"first": [[0, 0.9]]}},
            ValueError,
            "keys of layers must be numbers",
        ),
        (
            {"points": [[0, 0.9]], "layers": {"\uff11": [[0, 0.9]]}},
            ValueError,
            "keys of layers must be numbers",
        ),
        (
            {"points": [[0, 0.9]], "layers": {"3": [[0, 0]]}},
            ValueError,
            r"layers\.3\[0\]\[1\] must lie in",
        ),
        (
            {"points": [[0, 0.9]], "heads": {"3": {"1": [[0, True]]}}},
            TypeError,
            r"heads\.3\.1\[0\]\[1\] must be a number",
        ),
    ],
)
def test_a_wrong_file_is_refused_with_the_path_of_the_field(tmp_path, data, error, message):
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(data))
    with pytest.raises(error, match=f"plan.json: .*{message}"):
        ThresholdSchedule.load(path)


def test_a_file_that_is_not_json_is_refused(tmp_path):
    (tmp_path / "plan.json").write_text("points: 0.9")
    with pytest.raises(ValueError, match=r"plan\.json is not JSON"):
        ThresholdSchedule.load(tmp_path / "plan.json")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'\xff\xfe{"points"', "is not UTF-8 text; save it as UTF-8"),
        (b"[" * 100_000, "is nested too deeply; a schedule is"),
        (b'{"points": [[0, 0.9]], "points": [[0, 0.8]]}', "the key 'points' occurs twice in one"),
        (
            b'{"points": [[0, 0.9]], "layers": {"1": [[0, 0.9]], "01": [[0, 0.8]]}}',
            "layers names 1 twice, once as '01'",
        ),
        (
            b'{"points": [[0, 0.9]], "heads": {"2": {"1": [[0, 0.9]], "01": [[0, 0.8]]}}}',
            r"heads\.2 names 1 twice, once as '01'",
        ),
        (
            b'{"points": [[0, 0.9]], "heads": {"2": {"1": [[0, 0.9]]}, "02": {}}}',
            "heads names 2 twice, once as '02'",
        ),
    ],
    ids=["not text", "deep", "same key", "same layer", "same head", "same of heads"],
)
def test_a_file_that_says_no_one_schedule_is_refused(tmp_path, content, message):
    (tmp_path / "plan.json").write_bytes(content)
    with pytest.raises((ValueError, TypeError), match=rf"plan\.json.*{message}") as raised:
        ThresholdSchedule.load(tmp_path / "plan.json")
    assert "\n" not in str(raised.value)


def test_a_byte_order_mark_is_no_part_of_a_file(tmp_path):
    (tmp_path / "plan.json").write_text('{"points": [[0, 0.9]]}', encoding="utf-8-sig")
    assert ThresholdSchedule.load(tmp_path / "plan.json") == ThresholdSchedule.constant(0.9)


@pytest.mark.parametrize("value", [0, 1.01, -0.5, float("nan")])
def test_a_threshold_outside_its_range_is_refused(value):
    with pytest.raises(ValueError, match=r"threshold must lie in \(0, 1\]"):
        ThresholdSchedule.coerce(value)


@pytest.mark.parametrize(
    "value",
    ["0.9", None, True, torch.tensor([0.9, 0.8]), torch.ones(1, device="meta"), np.ones(2)],
)
def test_what_says_no_schedule_is_refused(value):
    with pytest.raises(TypeError, match=r"^threshold must be a number .*; a threshold may be a"):
        ThresholdSchedule.coerce(value)


def test_a_function_is_checked_when_it_is_asked():
    schedule = ThresholdSchedule.coerce(lambda step: 2.0)
    with pytest.raises(ValueError, match=r"value at step 3 must lie in \(0, 1\], got 2"):
        schedule.threshold(3)


def test_a_function_has_no_json_form():
    with pytest.raises(TypeError, match="cannot be saved as JSON; convert it"):
        ThresholdSchedule.coerce(lambda step: 0.9).to_dict()


def test_a_ramp_over_one_step_is_refused():
    with pytest.raises(ValueError, match="num_steps of at least 2, got 1"):
        ThresholdSchedule.linear(1.0, 0.9, 1)
