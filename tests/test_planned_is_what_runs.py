"""Plan, progress, report and layers agree, whatever the schedule."""

from collections import Counter

import pytest
from hunyuan import HEADS, NUM_LAYERS, VIDEO_TOKENS, generate, tiny_pipeline
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from xattn_video import ThresholdSchedule, enable_xattention
from xattn_video.pipelines.expected_work import ExpectedWork
from xattn_video.pipelines.generation import _StepRecorder
from xattn_video.pipelines.loading import LoadOptions
from xattn_video.pipelines.model_shape import ModelShape
from xattn_video.pipelines.request import GenerationRequest, VideoSettings
from xattn_video.pipelines.run_plan import plan_run
from xattn_video.policy.decision import Run, decide
from xattn_video.policy.settings import SparseSettings

STEPS = 5
SMALL = {"stride": 4, "block_size": 8}
TAUS = st.sampled_from([0.5, 1.0])
POINTS = st.dictionaries(st.integers(0, STEPS), TAUS, min_size=1, max_size=3).map(
    lambda points: tuple(sorted(points.items()))
)
SCHEDULES = st.builds(
    ThresholdSchedule,
    POINTS,
    st.sampled_from(["hold", "linear"]),
    st.dictionaries(st.integers(0, NUM_LAYERS - 1), POINTS, max_size=2),
    st.dictionaries(
        st.tuples(st.integers(0, NUM_LAYERS - 1), st.integers(0, HEADS - 1)), POINTS, max_size=3
    ),
)


def settings_with(kept, schedules):
    return st.builds(
        lambda kept, *given, **options: SparseSettings(*given, **options, **kept),
        st.sampled_from(kept),
        schedules,
        stride=st.just(SMALL["stride"]),
        block_size=st.just(SMALL["block_size"]),
        warmup_steps=st.integers(0, STEPS + 1),
        cooldown_steps=st.integers(0, STEPS + 1),
        min_tokens=st.sampled_from([0, VIDEO_TOKENS, VIDEO_TOKENS + 1]),
    )


SETTINGS = settings_with(
    [{}, {"mask_every": 2}, {"refresh_every": 2}, {"refresh_every": 3}], SCHEDULES
)
# Layer 1 skips no block at the first refresh, layer 2 at the second.
JOINING_LATE = ThresholdSchedule(
    ((0, 0.5),), layers={1: ((0, 1.0), (1, 0.5)), 2: ((0, 0.5), (2, 1.0), (3, 0.5))}
)


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipeline()


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@example(sparse=SparseSettings(0.5, **SMALL, warmup_steps=2, min_tokens=0, refresh_every=2))
@example(
    sparse=SparseSettings(JOINING_LATE, **SMALL, warmup_steps=0, min_tokens=0, refresh_every=2)
)
@given(sparse=SETTINGS)
def test_planned_is_what_runs(pipe, sparse):
    with enable_xattention(pipe, sparse) as handle:
        shown = []
        recorder = _StepRecorder(pipe, STEPS, handle.processor, shown.append)
        generate(pipe, STEPS, callback_on_step_end=recorder.step_ends)
    report = handle.processor.report()
    run = Run(NUM_LAYERS, HEADS, VIDEO_TOKENS, "cpu", STEPS)
    decisions = [decide(sparse, step, run) for step in range(STEPS)]
    # The layers, as the report tells.
    assert [[layer.reason for layer in forward.layers] for forward in report.forwards] == [
        [decision.layer_reason(layer) for layer in range(NUM_LAYERS)] for decision in decisions
    ]
    for forward, decision in zip(report.forwards, decisions, strict=True):
        assert tuple(layer.refreshed for layer in forward.layers) == decision.refreshing
    # Progress.
    assert [step.sparse for step in shown] == [decision.sparse for decision in decisions]
    # The plan.
    shape = ModelShape(heads=HEADS, double_layers=2, single_layers=2)
    video = VideoSettings(height=64, width=64, num_frames=9, num_inference_steps=STEPS)
    plan = plan_run(shape, video, sparse, LoadOptions(device="cpu"))
    assert plan.video_tokens == VIDEO_TOKENS
    assert (plan.dense_steps, plan.sparse_steps) == (
        STEPS - len(report.sparse_steps),
        len(report.sparse_steps),
    )
    assert plan.refresh_steps == len(set(report.refresh_steps) & set(report.sparse_steps))
    refreshed = sum(
        layer.refreshed and layer.state == "sparse"
        for forward in report.forwards
        for layer in forward.layers
    )
    assert plan.refreshed == refreshed / NUM_LAYERS
    # The time left.
    units = ExpectedWork(shape, "cpu", {}).of_run(
        GenerationRequest("a red circle", video=video, sparse=sparse)
    )
    kinds = Counter(step.kind for step in shown)
    assert {kind: units[kind] for kind in units.keys() - {"text", "decoding"}} == kinds
