"""The thresholds that layers and heads attend with."""

from dataclasses import replace

import pytest
from hunyuan import (
    HEADS,
    NUM_LAYERS,
    generate,
    run,
    states,
    tiny_pipeline,
    tiny_processor,
    tiny_transformer,
    with_processor,
)

from xattn_video import ThresholdSchedule
from xattn_video.processors import processor


def densities(report):
    """Of each layer of the latest forward pass."""
    return [run.density for run in report.forwards[-1].layers]


@pytest.fixture
def seen_thresholds(monkeypatch):
    """The thresholds that the sparse layers attend with, in the order they run."""
    seen = []
    attend = processor.sparse_attention

    def spy(query, key, value, threshold, forward, blocks):
        seen.append(threshold.flatten().tolist())
        return attend(query, key, value, threshold, forward, blocks)

    monkeypatch.setattr(processor, "sparse_attention", spy)
    return seen


def test_settings_are_replaced_as_a_whole():
    transformer, processor = with_processor(0.2)
    with pytest.raises(AttributeError, match=r"replace\(processor.settings, threshold=...\)"):
        processor.threshold = 0.99
    with pytest.raises(
        TypeError, match=r"settings must be a SparseSettings, got 0\.5; use Sparse"
    ):
        processor.settings = 0.5
    found = []
    for threshold in (0.2, 0.99):
        processor.settings = replace(processor.settings, threshold=threshold)
        run(transformer)
        found.append(processor.report().forwards[-1].threshold)
    assert found == [0.2, 0.99]


def test_steps_use_the_thresholds_they_were_given():
    pipe = tiny_pipeline()
    processor = tiny_processor([1, 0.9, 0.6, 0.3], warmup_steps=0)
    pipe.transformer.set_attn_processor(processor)
    generate(pipe, 5)
    report = processor.report()
    assert [forward.threshold for forward in report.forwards] == [1, 0.9, 0.6, 0.3, 0.3]
    assert states(report) == ["dense", *["sparse"] * 4]
    assert report.dense_reasons == {"threshold 1": NUM_LAYERS}
    by_step = [sum(run.kept for run in forward.layers) for forward in report.forwards[1:4]]
    assert by_step[0] > by_step[1] > by_step[2]


def test_layers_and_heads_use_thresholds_of_their_own():
    schedule = ThresholdSchedule(((0, 0.2),), layers={1: ((0, 1.0),), 3: ((0, 0.99),)})
    transformer, processor = with_processor(schedule)
    run(transformer)
    found = densities(processor.report())
    assert max(found[0], found[2]) < found[3] < 1.0
    assert processor.report().forwards[0].layers[1].reason == "threshold 1"
    assert processor.report().forwards[0].threshold is None

    every_head = {(0, head): ((0, 1.0),) for head in range(HEADS)}
    transformer, processor = with_processor(ThresholdSchedule(((0, 0.2),), heads=every_head))
    run(transformer)
    assert processor.report().forwards[0].layers[0].reason == "threshold 1"


def test_every_head_uses_the_threshold_of_its_own(seen_thresholds):
    taus = [[0.25, 0.5], [0.75, 0.5], [0.5, 0.125], [0.5, 0.5]]
    heads = {
        (layer, head): ((0, tau),)
        for layer, of_layer in enumerate(taus)
        for head, tau in enumerate(of_layer)
    }
    transformer, _ = with_processor(ThresholdSchedule(((0, 0.9),), heads=heads))
    run(transformer)
    assert seen_thresholds == taus


def test_the_layers_that_have_the_processor_use_the_thresholds_of_their_places(seen_thresholds):
    transformer = tiny_transformer()
    processor = tiny_processor(
        ThresholdSchedule(((0, 0.5),), layers={1: ((0, 0.25),), 3: ((0, 0.75),)}), warmup_steps=0
    )
    processors = dict(transformer.attn_processors)
    for block in ("transformer_blocks.1", "single_transformer_blocks.0"):
        processors[f"{block}.attn.processor"] = processor
    processors["single_transformer_blocks.1.attn.processor"] = processor
    transformer.set_attn_processor(processors)
    run(transformer)
    assert seen_thresholds == [[0.25] * HEADS, [0.5] * HEADS, [0.75] * HEADS]


@pytest.mark.parametrize(
    ("threshold", "expected"),
    [
        pytest.param(lambda step: 0.75 - step / 8, [0.75, 0.625, 0.5], id="function"),
        pytest.param(ThresholdSchedule.cosine(0.75, 0.25, 3), [0.75, 0.5, 0.25], id="cosine"),
    ],
)
def test_functions_and_ramps_reach_the_layers(threshold, expected, seen_thresholds):
    pipe = tiny_pipeline()
    processor = tiny_processor(threshold, warmup_steps=0)
    pipe.transformer.set_attn_processor(processor)
    generate(pipe, 3)
    assert [forward.threshold for forward in processor.report().forwards] == expected
    assert seen_thresholds == [[tau] for tau in expected for _ in range(NUM_LAYERS)]
