"""One decision for plan, progress, report and layers."""

from dataclasses import replace

import pytest

from xattn_video import ThresholdSchedule
from xattn_video.policy.decision import Run, StepCounts, count_steps, decide
from xattn_video.policy.settings import SparseSettings

LONG = Run(num_layers=2, num_heads=2, num_video_tokens=20_000, device_type="cuda", num_steps=6)


def reasons(settings, run=LONG):
    return [decide(settings, step, run).reason for step in range(run.num_steps)]


def test_a_step_is_dense_while_every_tau_of_every_layer_is_1():
    schedule = ThresholdSchedule(((0, 1.0),), layers={0: ((0, 1.0), (3, 0.5))})
    settings = SparseSettings(schedule, warmup_steps=0)
    assert reasons(settings) == ["threshold 1"] * 3 + [None] * 3
    assert count_steps(settings, LONG).dense == 3


def test_a_layer_whose_every_tau_is_1_stays_dense_in_a_sparse_step():
    schedule = ThresholdSchedule(((0, 0.9),), layers={1: ((0, 1.0),)})
    decision = decide(SparseSettings(schedule, warmup_steps=0), 0, LONG)
    assert (decision.layer_reason(0), decision.layer_reason(1)) == (None, "threshold 1")
    assert decision.computes_sparsely(0)
    assert not decision.computes_sparsely(1)


def test_a_head_with_a_tau_below_1_makes_its_layer_sparse():
    schedule = ThresholdSchedule(((0, 1.0),), heads={(1, 0): ((0, 0.5),)})
    decision = decide(SparseSettings(schedule, warmup_steps=0), 0, LONG)
    assert (decision.layer_reason(0), decision.layer_reason(1)) == ("threshold 1", None)


def test_warm_up_and_cool_down_are_the_first_and_the_last_steps():
    found = reasons(SparseSettings(0.9, warmup_steps=2, cooldown_steps=1))
    assert found == ["warm-up", "warm-up", None, None, None, "cool-down"]


@pytest.mark.parametrize(("device", "fewest"), [("cuda", 16384), ("cpu", 2048)])
def test_sparse_steps_begin_at_the_devices_number_of_tokens(device, fewest):
    few, enough = (Run(2, 2, tokens, device, 6) for tokens in (fewest - 1, fewest))
    settings = SparseSettings(0.9, warmup_steps=0)
    assert decide(settings, 0, few).reason == "too few tokens"
    assert decide(settings, 0, enough).sparse


def test_gradients_keep_a_step_dense():
    run = Run(2, 2, 20_000, "cuda", 6, needs_grad=True)
    assert decide(SparseSettings(0.9), 5, run).reason == "gradients"


def test_a_cool_down_needs_the_number_of_steps():
    run = Run(2, 2, 20_000, "cuda")
    with pytest.raises(ValueError, match="cooldown_steps needs the number of denoising steps"):
        decide(SparseSettings(0.9, warmup_steps=0, cooldown_steps=1), 0, run)


def refreshes(settings, run=LONG, steps=6):
    return [step for step in range(steps) if decide(settings, step, run).refreshes]


def test_the_last_warm_up_step_and_every_rth_after_it_refresh():
    settings = SparseSettings(0.9, warmup_steps=1, refresh_every=2)
    assert refreshes(settings) == [0, 2, 4]
    assert count_steps(settings, LONG) == StepCounts(
        2, 4, refreshes=2, primes=1, refreshed=2, choices=3
    )
    assert refreshes(settings, replace(LONG, num_steps=None), 9) == [0, 2, 4, 6, 8]
    assert refreshes(replace(settings, warmup_steps=0)) == [0, 2, 4]
    assert refreshes(SparseSettings(0.9, warmup_steps=1)) == []


def test_with_refreshes_the_last_step_is_dense():
    settings = SparseSettings(0.9, warmup_steps=1, refresh_every=3)
    assert reasons(settings) == ["warm-up", None, None, None, None, "last step"]
    assert decide(settings, 5, replace(LONG, num_steps=None)).sparse
    assert reasons(replace(settings, cooldown_steps=1))[5] == "cool-down"


def test_a_warm_up_that_no_sparse_step_follows_refreshes_nothing():
    assert refreshes(SparseSettings(0.9, warmup_steps=5, refresh_every=2)) == []
    assert refreshes(SparseSettings(0.9, warmup_steps=9, refresh_every=2)) == []
    settings = SparseSettings([1, 1, 1, 0.9, 0.9, 0.9], warmup_steps=1, refresh_every=2)
    assert refreshes(settings) == [3]


def test_a_refresh_in_the_warm_up_takes_the_thresholds_of_the_step_after_it():
    decision = decide(SparseSettings([1, 0.9, 0.8], warmup_steps=2, refresh_every=2), 1, LONG)
    assert decision.reason == "warm-up"
    assert decision.thresholds[0] == (0.8, 0.8)
    assert decision.computes_sparsely(0)


def test_blocks_are_chosen_at_every_mth_sparse_step_or_at_refreshes():
    def chooses(**options):
        settings = SparseSettings(0.9, warmup_steps=1, **options)
        decisions = [decide(settings, step, LONG) for step in range(1, 5)]
        return [any(decision.choosing) for decision in decisions]

    assert chooses() == [True] * 4
    assert chooses(mask_every=2) == [True, False, True, False]
    assert chooses(mask_every=3) == [True, False, False, True]
    assert chooses(refresh_every=3) == [False, False, True, False]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"refresh_every": 2}, [0, 0, 2, 2, 4]),
        ({"refresh_every": 3, "warmup_steps": 0}, [0, 0, 0, 3, 3]),
        ({"mask_every": 2}, [0, 1, 1, 3, 3]),
        ({}, [0, 1, 2, 3, 4]),
    ],
    ids=str,
)
def test_what_was_kept_is_due_at_the_first_step_of_a_period(options, expected):
    settings = SparseSettings(0.9, **{"warmup_steps": 1} | options)
    decisions = [decide(settings, step, LONG) for step in range(5)]
    assert [decision.due for decision in decisions] == expected
    assert [decision.step for decision in decisions] == [0, 1, 2, 3, 4]


def test_dense_steps_among_sparse_ones_do_not_count():
    settings = SparseSettings([0.9, 1, 0.9, 1, 0.9, 0.9], warmup_steps=0, refresh_every=2)
    assert refreshes(settings) == [0, 4]
    assert refreshes(replace(settings, cooldown_steps=2)) == [0]


@pytest.mark.parametrize("options", [{"refresh_every": 2}, {"mask_every": 2}], ids=str)
def test_a_layer_that_skipped_nothing_at_the_others_turn_has_its_own(options):
    schedule = ThresholdSchedule(
        ((0, 0.9),), layers={0: ((0, 1.0), (1, 0.9)), 1: ((0, 0.9), (2, 1.0), (3, 0.9))}
    )
    settings = SparseSettings(schedule, warmup_steps=0, **options)
    run = replace(LONG, num_layers=3, num_steps=None)
    decisions = [decide(settings, step, run) for step in range(5)]
    expected = [
        (False, True, True),
        (True, False, False),
        (True, False, True),
        (False, True, False),
        (True, True, True),
    ]
    assert [decision.choosing for decision in decisions] == expected
    refreshing = expected if "refresh_every" in options else [(False,) * 3] * 5
    assert [decision.refreshing for decision in decisions] == refreshing


def test_late_refreshes_are_counted_by_layer():
    schedule = ThresholdSchedule(((0, 0.9),), layers={0: ((0, 1.0), (1, 0.9))})
    settings = SparseSettings(schedule, warmup_steps=0, refresh_every=4)
    # Both layers refresh once, one of them a step late; the last step is dense.
    counts = count_steps(settings, replace(LONG, num_steps=4))
    assert counts == StepCounts(1, 3, refreshes=2, refreshed=1.0, choices=1.0)


def test_the_last_sparse_step_is_known_where_the_steps_are():
    settings = SparseSettings(0.9, warmup_steps=1, cooldown_steps=1, refresh_every=2)
    found = [decide(settings, step, LONG).last_sparse for step in range(6)]
    assert found == [False] * 4 + [True, False]
    assert not decide(
        replace(settings, cooldown_steps=0), 5, replace(LONG, num_steps=None)
    ).last_sparse
    # Nothing is kept: nobody asks.
    assert not decide(replace(settings, refresh_every=None), 4, LONG).last_sparse


def test_a_density_stands_for_the_threshold():
    decision = decide(SparseSettings(density=0.25, warmup_steps=0), 0, LONG)
    assert decision.sparse
    assert decision.thresholds == ((0.25, 0.25), (0.25, 0.25))
    assert decision.threshold is None
    assert reasons(SparseSettings(density=1, warmup_steps=0)) == ["density 1"] * 6


def test_a_refresh_after_more_steps_than_there_are_is_refused():
    settings = SparseSettings(0.9, refresh_every=7)
    with pytest.raises(
        ValueError, match="at most the number of denoising steps, got 7 and 6 steps"
    ):
        decide(settings, 0, LONG)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"density": 0}, r"density must lie in \(0, 1\], got 0"),
        ({"density": 1.1}, r"density must lie in \(0, 1\], got 1.1"),
        ({"density": float("nan")}, r"density must lie in \(0, 1\], got nan"),
        ({"density": "0.1"}, "density must be a number"),
        ({"density": True}, "density must be a number"),
        (
            {"density": 0.1, "threshold": 0.95},
            "cannot be combined, got density=0.1, threshold=0.95",
        ),
        ({"refresh_every": 0}, "refresh_every must be at least 1 step, got 0"),
        ({"refresh_every": -2}, "refresh_every must be at least 1 step, got -2"),
        ({"refresh_every": 2.0}, "refresh_every must be a whole number of steps, got 2.0"),
        ({"refresh_every": True}, "refresh_every must be a whole number of steps, got True"),
        ({"residual": "host"}, "residual='host' has no effect without refresh_every; give it too"),
        ({"mask_every": 0}, "mask_every must be at least 1 step, got 0"),
        ({"mask_every": None}, "mask_every must be a whole number of steps, got None"),
        ({"mask_every": 4, "refresh_every": 5}, "omit mask_every, got mask_every=4"),
        ({"token_order": "morton"}, "token_order must be one of raster, hilbert, got 'morton'"),
        ({"compensation": "mean"}, "compensation must be one of none, means, first-order"),
        ({"residual": "disk", "refresh_every": 2}, "residual must be one of auto, device, host"),
    ],
)
def test_settings_that_mean_nothing_are_refused(options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        SparseSettings(**options)


def test_settings_outlive_json():
    for settings in (SparseSettings(), SparseSettings(density=0.1, refresh_every=5)):
        assert SparseSettings(**settings.to_dict()) == settings
    assert SparseSettings().threshold == 0.95
