"""Expected seconds: measured ones come back, others follow from arithmetic done by hand."""

import json
from dataclasses import replace

import pytest
import torch
from command_line import run_cli

from benchmarks.several_gpus import parts_record
from benchmarks.whole_videos import read_whole_videos
from xattn_video import ThresholdSchedule
from xattn_video.measure.expected_seconds import (
    ExpectedSeconds,
    MeasuredParts,
    VideoParts,
    expected_seconds,
    expected_speedup,
)
from xattn_video.pipelines.loading import LoadOptions
from xattn_video.pipelines.model_shape import ModelShape
from xattn_video.pipelines.request import VideoSettings
from xattn_video.pipelines.run_plan import plan_run
from xattn_video.policy.settings import SparseSettings


def plan(num_gpus=1, device="cuda", sparse=True, shape=None, **video):
    load = LoadOptions(
        device=device, device_elsewhere=True, num_gpus=num_gpus, dtype=torch.bfloat16
    )
    settings = SparseSettings() if sparse else None
    return plan_run(shape or ModelShape(), VideoSettings(**video), settings, load)


TWO = plan(2)
MEASURED = MeasuredParts(
    device="A GPU",
    video="HunyuanVideo",
    video_tokens=TWO.video_tokens,
    dense_step_tflop=TWO.dense_step_tflop,
    attention_share=TWO.attention_share,
    density=0.5,
    one=VideoParts(text=3, dense_step=20, sparse_step=12, decoding=30),
    two=VideoParts(text=3, dense_step=11.5, sparse_step=7.5, decoding=18),
    exchange=0.5,
    sent_gib=TWO.share.sent_gib,
    sources=(),
)


def parts(density=0.5, **options):
    return ExpectedSeconds(MEASURED, plan(**options)).parts(density)


def test_measured_parts_come_back():
    assert parts() == MEASURED.one
    assert parts(num_gpus=2) == MEASURED.two


def test_what_is_not_shared_stays():
    """Of 20 s on one GPU 2 s stay: two took 2 + 18 / 2, and traded for 0.5 s."""
    found = parts(num_gpus=4)
    traded = 0.5 * plan(4).share.sent_gib / MEASURED.sent_gib
    assert traded == pytest.approx(0.375, rel=0.01)
    assert found.dense_step == pytest.approx(2 + 18 / 4 + traded)
    assert found.sparse_step == pytest.approx(2 + 10 / 4 + traded)
    assert found.decoding == pytest.approx(6 + 24 / 4)


def test_a_sum_of_all_parts_is_expected():
    expected = ExpectedSeconds(MEASURED, plan())
    assert expected.total(0.5) == 3 + 5 * 20 + 45 * 12 + 30
    dense = ExpectedSeconds(MEASURED, plan(sparse=False))
    assert dense.total(1.0) == 3 + 50 * 20 + 30
    assert "50 dense x 20.00 + 30 decoding" in dense.describe()


def test_a_refresh_runs_dense_too_in_the_layers_that_refresh():
    late = ThresholdSchedule(((0, 0.9),), layers={0: ((0, 1.0), (6, 0.9))})
    settings = SparseSettings(late, warmup_steps=5, refresh_every=50)
    load = LoadOptions(device="cuda", device_elsewhere=True, dtype=torch.bfloat16)
    found = plan_run(ModelShape(), VideoSettings(), settings, load)
    # The warm-up's last step refreshes 59 layers, step 6 the first one; the last step is dense.
    assert (found.dense_steps, found.sparse_steps, found.refresh_steps) == (6, 44, 1)
    seconds = ExpectedSeconds(MEASURED, found).total(0.5)
    assert seconds == pytest.approx(3 + (6 + 1 / 60) * 20 + 44 * 12 + 30)


def test_a_sparse_step_saves_attention_in_proportion():
    assert parts(1.0).sparse_step == 20
    assert parts(0.75).sparse_step == 16
    small = plan(height=480, width=832)
    saved = 8 * small.attention_share / MEASURED.attention_share
    work = small.dense_step_tflop / MEASURED.dense_step_tflop
    found = parts(height=480, width=832)
    assert found.sparse_step == pytest.approx(work * (20 - saved))
    assert found.dense_step == pytest.approx(work * 20)
    assert found.decoding == pytest.approx(30 * small.video_tokens / MEASURED.video_tokens)


def test_true_guidance_takes_every_pass_twice():
    found = parts(true_cfg_scale=2.0)
    assert (found.text, found.dense_step, found.decoding) == (6, 40, 30)


def test_nothing_is_expected_of_what_was_not_measured():
    assert expected_seconds(ModelShape(), plan()) is not None
    assert expected_seconds(ModelShape(), plan(device="cpu")) is None
    small = replace(ModelShape(), heads=2)
    assert expected_seconds(small, plan(shape=small)) is None


def test_the_package_carries_what_the_committed_results_say():
    assert MeasuredParts.read() == MeasuredParts.of_record(parts_record(read_whole_videos()))


def test_the_plan_tells_the_seconds_and_where_they_come_from():
    code, out, _ = run_cli("plan", "--device=cuda", "--num-gpus=4")
    assert code == 0
    words = " ".join(out.split())
    assert "seconds about 163 at density 0.336 on NVIDIA H100 80GB HBM3 without offl" in words
    assert "(a model from measured parts: 3 text + 5 dense x 5.07 + 45 sparse x" in words
    assert "a video" in out
    words = ("plan", "--device=cuda", "--preset=balanced", "--json")
    rows = json.loads(run_cli(*words)[1])["expected"]["rows"]
    seconds = next(row["seconds"] for row in rows if row["density"] == 0.1)
    told = " ".join(run_cli(*words[:-1])[1].split())
    assert f"seconds about {seconds:.0f} at density 0.100 on" in told
    words = ("plan", "--device=cuda", "--num-gpus=4", "--json")
    expected = json.loads(run_cli(*words)[1])["expected"]
    assert [row["density"] for row in expected["rows"]] == [0.2, 0.34, 0.455, 0.6, 0.8]
    assert expected["rows"][0]["seconds"] < expected["rows"][1]["seconds"]
    out = run_cli("plan", "--device=cpu")[1]
    assert "seconds" not in out
    assert "a video" not in out


def test_the_speed_up_of_settings_is_what_plans_say():
    settings = SparseSettings(density=0.1, refresh_every=15, compensation="first-order")
    load = LoadOptions(device="cuda", device_elsewhere=True)
    sparse = plan_run(ModelShape(), VideoSettings(), settings, load)
    seconds = ExpectedSeconds(MeasuredParts.read(), sparse).total(0.1)
    dense = ExpectedSeconds(MeasuredParts.read(), plan(sparse=False)).total(1.0)
    found = expected_speedup(settings)
    assert found.value == f"{dense / seconds:.2f}x"
    assert f"about {seconds:.0f} s per video instead of {dense:.0f} s" in found.note
    # A threshold does not say how many blocks it keeps.
    assert expected_speedup(SparseSettings()) is None
