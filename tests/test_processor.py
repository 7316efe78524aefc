import copy
import pickle
from types import SimpleNamespace

import pytest
import torch
from diffusers import HunyuanVideoTransformer3DModel
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
from hunyuan import (
    HEADS,
    NUM_LAYERS,
    TEXT_TOKENS,
    VIDEO_TOKENS,
    forward_inputs,
    generate,
    states,
    tiny_pipeline,
    tiny_processor,
    tiny_transformer,
)

from xattn_video import (
    BackendUnavailableError,
    ThresholdSchedule,
    UnboundProcessorError,
    UnsupportedModelError,
    XAttnProcessor,
)
from xattn_video.processors import joint_attention

STOCK_REFINER = "context_embedder.token_refiner.refiner_blocks.0.attn"


def run(transformer, **options):
    """One forward pass without gradients."""
    with torch.no_grad():
        return transformer(**forward_inputs(**options)).sample


def with_processor(threshold=0.5, model=None, **options):
    """A transformer and the processor that was set on it; sparse from step 0."""
    transformer = tiny_transformer() if model is None else model
    processor = tiny_processor(threshold, **({"warmup_steps": 0} | options))
    transformer.set_attn_processor(processor)
    return transformer, processor


def densities(report):
    """Of each layer of the latest forward pass."""
    return [run.density for run in report.forwards[-1].layers]


# Dense steps


@pytest.mark.parametrize("lengths", [(TEXT_TOKENS,), (10,), (1,), (10, 10), (10, 3), (5, 1, 16)])
def test_a_dense_step_gives_what_the_stock_processor_gives(lengths):
    expected = run(tiny_transformer(), lengths=lengths)
    transformer, processor = with_processor(1.0)
    torch.testing.assert_close(run(transformer, lengths=lengths), expected, rtol=1e-5, atol=1e-5)
    assert processor.report().dense_reasons == {"threshold 1": NUM_LAYERS}


def test_a_dense_step_without_padding_is_the_stock_one_bit_for_bit():
    """Nothing is cut then: the same kernel runs on the same tensors."""
    transformer = tiny_transformer()
    stock = transformer.attn_processors["transformer_blocks.0.attn.processor"]
    attn = transformer.transformer_blocks[0].attn
    video, text = torch.randn(2, VIDEO_TOKENS, 32), torch.randn(2, TEXT_TOKENS, 32)
    expected = stock(attn, video, text, None, None)
    transformer, _ = with_processor(1.0, transformer)
    run(transformer, lengths=(TEXT_TOKENS, TEXT_TOKENS))
    with torch.no_grad():
        found = attn(video, encoder_hidden_states=text, attention_mask=None, image_rotary_emb=None)
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])


def test_a_dense_step_runs_without_a_mask_on_the_valid_keys(monkeypatch):
    calls = []
    dispatch = joint_attention.dispatch_attention_fn

    def spy(query, key, value, **options):
        calls.append((query.shape[:2], key.shape[:2], options))
        return dispatch(query, key, value, **options)

    monkeypatch.setattr(joint_attention, "dispatch_attention_fn", spy)
    transformer, _ = with_processor(1.0)
    run(transformer, lengths=(10, 10))
    whole = VIDEO_TOKENS + TEXT_TOKENS
    assert calls == [((2, whole), (2, VIDEO_TOKENS + 10), {"backend": None})] * NUM_LAYERS
    calls.clear()
    run(transformer, lengths=(10, 3))
    assert [key for _, key, _ in calls[:2]] == [(1, VIDEO_TOKENS + 10), (1, VIDEO_TOKENS + 3)]
    assert all("attn_mask" not in options for _, _, options in calls)


def test_a_dense_step_uses_the_attention_backend_that_was_set(monkeypatch):
    used = []
    dispatch = joint_attention.dispatch_attention_fn
    monkeypatch.setattr(
        joint_attention,
        "dispatch_attention_fn",
        lambda *args, backend: used.append(backend) or dispatch(*args, backend=backend),
    )
    transformer, _ = with_processor(1.0)
    expected = run(transformer)
    try:
        transformer.set_attention_backend("_native_math")
        torch.testing.assert_close(run(transformer), expected)
        assert used[-NUM_LAYERS:] == [AttentionBackendName._NATIVE_MATH] * NUM_LAYERS
        transformer.reset_attention_backend()
        run(transformer)
        assert used[-NUM_LAYERS:] == [None] * NUM_LAYERS
    finally:
        # Diffusers leaves it set for the whole process.
        _AttentionBackendRegistry.set_active_backend(AttentionBackendName.NATIVE)


def test_few_tokens_run_dense():
    transformer, processor = with_processor(min_tokens=VIDEO_TOKENS + 1)
    run(transformer)
    assert processor.report().dense_reasons == {"too few tokens": NUM_LAYERS}
    transformer, processor = with_processor(min_tokens=VIDEO_TOKENS)
    run(transformer)
    assert states(processor.report()) == ["sparse"]


def test_gradients_run_dense_and_equal_the_stock_ones():
    def gradient(transformer):
        transformer.requires_grad_(True)
        transformer(**forward_inputs(lengths=(10, 3))).sample.square().sum().backward()
        return transformer.transformer_blocks[0].attn.to_q.weight.grad

    expected = gradient(tiny_transformer())
    transformer, processor = with_processor()
    assert torch.equal(gradient(transformer), expected)
    assert processor.report().dense_reasons == {"gradients": NUM_LAYERS}
    run(transformer)
    assert states(processor.report())[-1] == "sparse"


# Sparse steps


@pytest.mark.parametrize("lengths", [(TEXT_TOKENS,), (10,), (1,), (10, 10), (10, 3), (5, 1, 16)])
def test_a_sparse_step_that_keeps_every_block_equals_the_dense_one(lengths):
    expected = run(tiny_transformer(), lengths=lengths)
    # One head below 1 makes the step sparse; its threshold still keeps all.
    schedule = ThresholdSchedule(((0, 1.0),), heads={(0, 0): ((0, 1 - 1e-7),)})
    transformer, processor = with_processor(schedule)
    torch.testing.assert_close(run(transformer, lengths=lengths), expected, rtol=1e-4, atol=1e-4)
    assert states(processor.report()) == ["sparse"]
    assert processor.report().density == 1.0


def test_a_high_threshold_stays_close_to_dense():
    expected = run(tiny_transformer())
    distances = []
    for threshold in (0.3, 0.9, 0.99):
        transformer, processor = with_processor(threshold)
        distances.append((run(transformer) - expected).norm() / expected.norm())
        assert processor.report().density < 1
    assert distances[0] > distances[1] > distances[2]
    assert distances[2] < 0.1


def test_density_grows_with_the_threshold():
    found = []
    for threshold in (0.2, 0.5, 0.9, 0.99):
        transformer, processor = with_processor(threshold)
        run(transformer)
        found.append(processor.report().density)
    assert found == sorted(found)
    assert found[0] < found[-1]


def test_the_items_of_a_batch_do_not_touch_each_other():
    """Prompts of different lengths in one batch: each item as if it ran alone."""
    transformer, _ = with_processor()
    arguments = forward_inputs(lengths=(10, 3, 16))
    with torch.no_grad():
        together = transformer(**arguments).sample
        for item in range(3):
            alone = {name: value[item : item + 1] for name, value in arguments.items()}
            torch.testing.assert_close(
                together[item : item + 1], transformer(**alone).sample, rtol=1e-4, atol=1e-5
            )


def test_padded_text_changes_nothing():
    transformer, _ = with_processor()
    arguments = forward_inputs(lengths=(10, 3))
    with torch.no_grad():
        expected = transformer(**arguments).sample
        arguments["encoder_hidden_states"][0, 10:] = 1e3
        arguments["encoder_hidden_states"][1, 3:] = 1e3
        torch.testing.assert_close(transformer(**arguments).sample, expected)


def test_the_token_refiner_is_computed_as_ever():
    def refined(transformer):
        outputs = []
        transformer.context_embedder.register_forward_hook(lambda *call: outputs.append(call[2]))
        run(transformer, lengths=(10, 3))
        return outputs[0]

    expected = refined(tiny_transformer())
    transformer, processor = with_processor()
    assert torch.equal(refined(transformer), expected)
    assert transformer.get_submodule(STOCK_REFINER).processor is processor
    assert len(processor.report().layer_names) == NUM_LAYERS


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
    assert found[1] == 1.0
    assert max(found[0], found[2]) < found[3] < 1.0
    assert processor.report().forwards[0].threshold is None

    every_head = {(0, head): ((0, 1.0),) for head in range(HEADS)}
    transformer, processor = with_processor(ThresholdSchedule(((0, 0.2),), heads=every_head))
    run(transformer)
    assert densities(processor.report())[0] == 1.0


def test_the_density_counts_kept_over_valid_blocks():
    transformer, processor = with_processor()
    run(transformer, lengths=(10, 3))
    rows, columns = (VIDEO_TOKENS + TEXT_TOKENS) // 8, [(58 + 7) // 8, (51 + 7) // 8]
    layer = processor.report().forwards[0].layers[0]
    assert layer.valid == rows * sum(columns) * HEADS
    assert 0 < layer.kept < layer.valid


def test_only_the_layers_that_have_the_processor_are_sparse():
    transformer = tiny_transformer()
    processor = tiny_processor(warmup_steps=0)
    processors = dict(transformer.attn_processors)
    processors["single_transformer_blocks.1.attn.processor"] = processor
    transformer.set_attn_processor(processors)
    run(transformer)
    assert processor.report().layer_names == ("single_transformer_blocks.1",)
    assert processor.report().summary().startswith("1/1 steps x 1/1 layers sparse")


@pytest.mark.parametrize("image_condition_type", ["token_replace", "latent_concat"])
def test_the_image_to_video_variants_run_sparse(image_condition_type):
    model = tiny_transformer(image_condition_type=image_condition_type)
    expected = run(model)
    transformer, processor = with_processor(0.999, model)
    torch.testing.assert_close(run(transformer), expected, rtol=0.1, atol=0.1)
    assert states(processor.report()) == ["sparse"]


@pytest.mark.parametrize("threshold", [1.0, 0.9])
def test_autocast_runs(threshold):
    with torch.autocast("cpu", torch.bfloat16):
        expected = run(tiny_transformer())
        transformer, processor = with_processor(threshold)
        found = run(transformer)
    assert found.dtype == expected.dtype
    torch.testing.assert_close(found, expected, rtol=0.1, atol=0.2)
    assert states(processor.report()) == ["dense" if threshold == 1 else "sparse"]


# Binding


def test_an_unbound_processor_says_how_to_bind():
    transformer = tiny_transformer()
    processor = tiny_processor()
    for block in transformer.transformer_blocks:
        block.attn.set_processor(processor)
    with pytest.raises(UnboundProcessorError, match=r"set_attn_processor.*processor\.bind"):
        run(transformer)
    with pytest.raises(UnboundProcessorError, match="nothing to report"):
        processor.report()
    processor.bind(transformer)
    run(transformer)
    assert processor.report().summary().startswith("0/1 steps x 0/2 layers")


def test_another_model_is_refused_and_keeps_its_processors():
    from diffusers import FluxTransformer2DModel

    model = FluxTransformer2DModel(
        num_layers=1,
        num_single_layers=1,
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        joint_attention_dim=8,
        pooled_projection_dim=8,
        axes_dims_rope=(4, 6, 6),
    )
    before = dict(model.attn_processors)
    with pytest.raises(UnsupportedModelError, match=r"FluxTransformer2DModel.*HunyuanVideoTrans"):
        model.set_attn_processor(tiny_processor())
    assert model.attn_processors == before
    with pytest.raises(UnsupportedModelError, match="Linear"):
        tiny_processor().bind(torch.nn.Linear(2, 2))


def test_other_processors_are_set_as_ever():
    transformer = tiny_transformer()
    stock = dict(transformer.attn_processors)
    transformer.set_attn_processor(tiny_processor())
    transformer.set_attn_processor(dict(stock))
    assert transformer.attn_processors == stock
    assert not transformer._forward_pre_hooks


def test_a_second_transformer_is_refused():
    transformer, processor = with_processor()
    other = tiny_transformer()
    before = dict(other.attn_processors)
    with pytest.raises(ValueError, match=r"serves another transformer.*deepcopy"):
        other.set_attn_processor(processor)
    assert other.attn_processors == before
    transformer.set_attn_processor(copy.deepcopy(processor))
    other.set_attn_processor(processor)
    run(other)
    assert processor.step_index == 0


def test_a_transformer_without_the_processor_is_not_bound():
    with pytest.raises(ValueError, match="no layer of this transformer uses"):
        tiny_processor().bind(tiny_transformer())


def test_setting_it_twice_leaves_one_hook():
    transformer, processor = with_processor()
    transformer.set_attn_processor(processor)
    assert len(transformer._forward_pre_hooks) == 1
    run(transformer)
    run(transformer, timestep=400.0)
    assert processor.step_index == 1


def test_a_copy_of_the_processor_is_independent():
    transformer, processor = with_processor()
    run(transformer)
    twin = copy.deepcopy(processor)
    other = tiny_transformer()
    other.set_attn_processor(twin)
    run(other)
    run(other, timestep=400.0)
    assert (processor.step_index, twin.step_index) == (0, 1)
    assert repr(twin) == repr(processor)


def test_a_pickled_processor_works():
    _, processor = with_processor([0.9, 0.5])
    twin = pickle.loads(pickle.dumps(processor))
    transformer = tiny_transformer()
    transformer.set_attn_processor(twin)
    run(transformer)
    assert twin.report().forwards[0].threshold == 0.9


@pytest.mark.parametrize(
    "clone",
    [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))],
    ids=["copy", "pickle"],
)
def test_a_copied_transformer_brings_a_processor_of_its_own(clone):
    transformer, processor = with_processor(warmup_steps=1)
    run(transformer)
    run(transformer, timestep=400.0)
    other = clone(transformer)
    twin = other.transformer_blocks[0].attn.processor
    assert twin is not processor
    expected = run(other)
    assert (processor.step_index, twin.step_index) == (1, 0)
    assert states(twin.report()) == ["dense"]
    torch.testing.assert_close(expected, run(tiny_transformer()))


def test_a_saved_transformer_loads_without_the_processor(tmp_path):
    transformer, _ = with_processor()
    run(transformer)
    transformer.save_pretrained(tmp_path)
    loaded = HunyuanVideoTransformer3DModel.from_pretrained(tmp_path)
    assert not any(isinstance(p, XAttnProcessor) for p in loaded.attn_processors.values())
    torch.testing.assert_close(run(loaded), run(tiny_transformer()))


def test_a_freed_transformer_frees_its_processor_for_another():
    transformer, processor = with_processor()
    stock = dict(tiny_transformer().attn_processors)
    transformer.set_attn_processor(stock)
    other = tiny_transformer()
    other.set_attn_processor(processor)
    run(other)
    assert states(processor.report()) == ["sparse"]


# Refusals


def test_a_backend_that_cannot_run_is_refused_before_any_layer(monkeypatch):
    from xattn_video.backends import torch_gather

    transformer, processor = with_processor(backend="torch_gather")
    run(transformer)
    monkeypatch.setattr(torch_gather, "unsupported_reasons", lambda problem: ["not today."])
    with pytest.raises(BackendUnavailableError, match="not today"):
        run(transformer, timestep=400.0)
    assert processor.report().num_refused == 1
    assert processor.report().summary().endswith("1 refused")


def test_sparse_steps_refuse_context_parallelism():
    config = SimpleNamespace(context_parallel_config=object())
    transformer, processor = with_processor()
    # What enable_parallelism does to the processors that are there ...
    processor._parallel_config = config
    with pytest.raises(NotImplementedError, match="context parallelism"):
        run(transformer)
    # ... and what a processor finds that comes later.
    transformer = tiny_transformer()
    transformer._parallel_config = config
    transformer, processor = with_processor(model=transformer)
    assert processor._parallel_config is config
    with pytest.raises(NotImplementedError, match="context parallelism"):
        run(transformer)


def test_cooling_down_needs_the_number_of_steps():
    transformer, processor = with_processor(cooldown_steps=1)
    with pytest.raises(ValueError, match=r"use enable_xattention\(pipe, cooldown_steps"):
        run(transformer)
    processor.bind(transformer, num_steps=2)
    run(transformer)
    run(transformer, timestep=400.0)
    assert states(processor.report()) == ["sparse", "dense"]
    assert processor.report().dense_reasons == {"cool-down": NUM_LAYERS}


def test_a_schedule_for_another_model_is_refused_when_it_is_set():
    schedule = ThresholdSchedule(((0, 0.9),), layers={NUM_LAYERS: ((0, 0.8),)})
    with pytest.raises(ValueError, match=f"layer {NUM_LAYERS}, but the transformer has"):
        tiny_transformer().set_attn_processor(tiny_processor(schedule))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threshold": 0}, r"threshold must lie in \(0, 1\], got 0"),
        ({"threshold": [0.9, 1.2]}, r"points\[1\]\[1\] must lie in \(0, 1\], got 1.2"),
        ({"stride": 12}, "stride must divide block_size, got stride=12, block_size=128"),
        ({"warmup_steps": -1}, "warmup_steps must be a whole number of at least 0, got -1"),
        ({"cooldown_steps": 1.5}, "cooldown_steps must be a whole number"),
        ({"backend": "cudnn"}, "unknown attention backend 'cudnn'; expected one of auto"),
    ],
)
def test_wrong_arguments_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        XAttnProcessor(**options)


def test_the_defaults_are_those_of_the_paper():
    assert repr(XAttnProcessor()) == (
        "XAttnProcessor(threshold=0.95, stride=8, block_size=128, warmup_steps=5, "
        "cooldown_steps=0, min_tokens=1024, backend='auto')"
    )
