"""What a processor serves, its copies, and what it refuses."""

import copy
import pickle

import pytest
import torch
from diffusers import HunyuanVideoTransformer3DModel
from hunyuan import (
    NUM_LAYERS,
    VIDEO_TOKENS,
    run,
    states,
    tiny_processor,
    tiny_transformer,
    with_processor,
)

from xattn_video import (
    BackendUnavailableError,
    ThresholdSchedule,
    UnboundProcessorError,
    UnsupportedModelError,
    XAttnProcessor,
)

LAYERS = tuple(
    f"{stack}.{number}"
    for stack in ("transformer_blocks", "single_transformer_blocks")
    for number in range(NUM_LAYERS // 2)
)


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
    with pytest.raises(ValueError, match=r"is bound to another transformer.*deepcopy"):
        other.set_attn_processor(processor)
    assert other.attn_processors == before
    transformer.set_attn_processor(copy.deepcopy(processor))
    other.set_attn_processor(processor)
    run(other)
    assert processor.step_index == 0


def test_a_transformer_without_the_processor_is_not_bound():
    with pytest.raises(ValueError, match="no layer of this transformer uses"):
        tiny_processor().bind(tiny_transformer())


def test_a_transformer_that_it_left_does_not_end_its_work_on_another():
    first, processor = with_processor()
    processor.unbind(first)
    first.set_attn_processor(tiny_processor())
    second = tiny_transformer()
    second.set_attn_processor(processor)
    processor.unbind(first)
    run(second)
    assert processor.step_index == 0
    tiny_processor().unbind(first)


def test_a_layer_whose_processor_was_replaced_by_hand_leaves_the_report():
    transformer, processor = with_processor()
    stock = tiny_transformer().attn_processors
    last = transformer.single_transformer_blocks[1].attn
    run(transformer)
    last.processor = stock["single_transformer_blocks.1.attn.processor"]
    for _ in range(2):
        run(transformer)
        report = processor.report()
        assert report.layer_names == LAYERS[:-1]
        assert states(report) == ["sparse"]
    last.processor = processor
    run(transformer)
    assert processor.report().layer_names == LAYERS
    assert states(processor.report()) == ["sparse"]


def test_a_layer_replaced_in_a_generation_does_not_start_another():
    transformer, processor = with_processor(warmup_steps=1)
    run(transformer, timestep=900.0)
    transformer.transformer_blocks[0].attn.processor = tiny_transformer().attn_processors[
        "transformer_blocks.0.attn.processor"
    ]
    run(transformer, timestep=500.0)
    assert processor.step_index == 1
    assert processor.report().layer_names == LAYERS[1:]
    assert states(processor.report()) == ["sparse"]


def test_layers_that_another_processor_had_are_served_again():
    transformer, processor = with_processor()
    other = tiny_processor()
    layers = [part for part in transformer.modules() if getattr(part, "processor", 0) is processor]
    run(transformer)
    for one in (other, processor):
        for layer in layers:
            layer.processor = one
        one.bind(transformer)
    for _ in range(2):
        run(transformer)
        assert states(processor.report()) == ["sparse"]


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


def test_a_backend_that_cannot_run_is_refused_before_any_layer(monkeypatch):
    from xattn_video.backends import table, torch_gather

    transformer, processor = with_processor(backend="torch_gather")
    run(transformer)
    monkeypatch.setattr(torch_gather, "unsupported_reasons", lambda problem: ["not today."])
    table._resolve_named.cache_clear()
    with pytest.raises(BackendUnavailableError, match="not today"):
        run(transformer, timestep=400.0)
    assert processor.report().num_refused == 1
    assert processor.report().summary().endswith("1 refused")


def test_a_backend_that_cannot_run_is_refused_before_the_warm_up(monkeypatch):
    from xattn_video.backends import torch_gather

    monkeypatch.setattr(torch_gather, "unsupported_reasons", lambda problem: ["not today."])
    transformer, processor = with_processor(backend="torch_gather", warmup_steps=2)
    with pytest.raises(BackendUnavailableError, match="not today"):
        run(transformer)
    assert processor.report().num_refused == 1
    # What never runs sparse needs no backend.
    for options in ({"threshold": 1.0}, {"min_tokens": VIDEO_TOKENS + 1}):
        transformer, processor = with_processor(backend="torch_gather", **options)
        run(transformer)
        assert states(processor.report()) == ["dense"]


def test_cooling_down_needs_the_number_of_steps():
    transformer, processor = with_processor(cooldown_steps=1, warmup_steps=2)
    with pytest.raises(ValueError, match=r"use enable_xattention\(pipe, cooldown_steps"):
        run(transformer)
    processor.bind(transformer, num_steps=4)
    for timestep in (900.0, 600.0, 400.0, 200.0):
        run(transformer, timestep=timestep)
    assert states(processor.report()) == ["dense", "dense", "sparse", "dense"]
    assert processor.report().dense_reasons == {"warm-up": 2 * NUM_LAYERS, "cool-down": NUM_LAYERS}


def test_a_schedule_for_another_model_is_refused_when_it_is_set():
    schedule = ThresholdSchedule(((0, 0.9),), layers={NUM_LAYERS: ((0, 0.8),)})
    with pytest.raises(ValueError, match=f"layer {NUM_LAYERS}, but the model has"):
        tiny_transformer().set_attn_processor(tiny_processor(schedule))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threshold": 0}, r"threshold must lie in \(0, 1\], got 0"),
        ({"threshold": [0.9, 1.2]}, r"points\[1\]\[1\] must lie in \(0, 1\], got 1.2"),
        ({"stride": 12}, "stride must divide block_size, got stride=12, block_size=128"),
        ({"warmup_steps": -1}, "warmup_steps must be at least 0, got -1"),
        ({"cooldown_steps": 1.5}, "cooldown_steps must be a whole number"),
        ({"backend": "cudnn"}, "unknown attention backend 'cudnn'; expected one of auto"),
        ({"scoring_precision": "half"}, 'must be "auto", "exact" or "float8", got \'half\''),
    ],
)
def test_wrong_arguments_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        XAttnProcessor(**options)


@pytest.mark.parametrize("options", [{"stride": 8.0}, {"stride": "8"}, {"block_size": 128.0}])
def test_arguments_of_a_wrong_type_are_refused(options):
    ((name, size),) = options.items()
    with pytest.raises(
        TypeError, match=f"{name} must be an integer number of tokens, got {size!r}"
    ):
        XAttnProcessor(**options)


def test_the_defaults_are_those_of_the_paper():
    assert repr(XAttnProcessor()) == (
        "XAttnProcessor(threshold=0.95, stride=8, block_size=128, warmup_steps=5, "
        "cooldown_steps=0, min_tokens=None, backend='auto', scoring_precision='auto', "
        "density=None, token_order='raster', compensation='none', mask_every=1, "
        "refresh_every=None, residual='auto')"
    )
