"""One decision for plan, progress, report and layers."""

import pytest

from xattn_video import ThresholdSchedule
from xattn_video.policy.decision import Run, count_dense_steps, decide
from xattn_video.policy.settings import SparseSettings

LONG = Run(num_layers=2, num_heads=2, num_video_tokens=20_000, device_type="cuda", num_steps=6)


def reasons(settings, run=LONG):
    return [decide(settings, step, run).reason for step in range(run.num_steps)]


def test_a_step_is_dense_while_every_tau_of_every_layer_is_1():
    schedule = ThresholdSchedule(((0, 1.0),), layers={0: ((0, 1.0), (3, 0.5))})
    settings = SparseSettings(schedule, warmup_steps=0)
    assert reasons(settings) == ["threshold 1"] * 3 + [None] * 3
    assert count_dense_steps(settings, LONG) == 3


def test_a_layer_whose_every_tau_is_1_stays_dense_in_a_sparse_step():
    schedule = ThresholdSchedule(((0, 0.9),), layers={1: ((0, 1.0),)})
    decision = decide(SparseSettings(schedule, warmup_steps=0), 0, LONG)
    assert (decision.layer_reason(0), decision.layer_reason(1)) == (None, "threshold 1")


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
