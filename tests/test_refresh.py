"""Steps that refresh what the layers keep, in whole generations."""

import copy
import dataclasses
import pickle
import weakref
from types import SimpleNamespace

import psutil
import pytest
import torch
from hunyuan import (
    NUM_LAYERS,
    generate,
    prompt,
    run,
    tiny_pipeline,
    tiny_transformer,
    with_processor,
)
from torch._dynamo.testing import CompileCounter

from xattn_video import enable_xattention
from xattn_video.errors import ResidualMemoryError
from xattn_video.processors.kept import KeptStore

SMALL = {"stride": 4, "block_size": 8, "min_tokens": 0}
OPTIONS = SMALL | {"warmup_steps": 1, "density": 0.2, "refresh_every": 3}


def store_of(processor) -> KeptStore:
    return processor._session._kept


def tensors_of(store) -> list[weakref.ref]:
    """Weak references to all that is kept."""
    passes = [kept.residuals for _, kept in store._passes.values()]
    return [weakref.ref(one.values) for kept in passes for one in kept._kept.values()]


def test_a_refresh_at_every_step_is_dense_attention():
    sparse, dense = tiny_pipeline(), tiny_pipeline()
    processor = enable_xattention(sparse, **OPTIONS | {"refresh_every": 1}).processor
    enable_xattention(dense, 1.0, **SMALL)
    assert torch.equal(generate(sparse), generate(dense))
    assert processor.report().refresh_steps == (0, 1, 2)
    assert processor.report().budget == 1


def test_steps_between_two_refreshes_are_nearer_to_dense_ones():
    outputs = {}
    for name, options in {
        "dense": {"threshold": 1.0},
        "sparse": {"density": 0.2},
        "refreshed": {"density": 0.2, "refresh_every": 2},
    }.items():
        transformer, _ = with_processor(**{"threshold": None} | options)
        run(transformer, timestep=500.0)
        outputs[name] = run(transformer, timestep=490.0)
    error = {name: (out - outputs["dense"]).norm() for name, out in outputs.items()}
    assert error["refreshed"] < error["sparse"] / 4


def test_the_report_and_its_budget_count_refreshes():
    pipe = tiny_pipeline()
    processor = enable_xattention(pipe, **OPTIONS).processor
    generate(pipe, 6)
    report = processor.report()
    assert report.refresh_steps == (0, 3)
    refreshed = [run.refreshed for forward in report.forwards for run in forward.layers]
    expected = [step in (0, 3) for step in range(6)]
    assert refreshed == [one for one in expected for _ in range(NUM_LAYERS)]
    density = report.forwards[2].layers[0].density
    # By hand: 48 video and 10 text tokens make 8 rows of 8 blocks, 2 of them of text. Of the six
    # video rows two text blocks are forced and fill the share of round(0.2 * 8) = 2.
    assert density == (6 * 2 + 2 * 8) / 64
    assert report.density == density
    # One refresh among the sparse steps, and the last step.
    assert report.budget == pytest.approx((3 * density + 2) / 5)
    assert "layers sparse and 2 refreshed, density" in report.summary()
    assert "(budget 0.66)" in report.summary()


def test_true_guidance_keeps_a_residual_for_each_of_its_passes():
    """The second step repeats the first one's inputs, nearly: both passes are nearly dense."""
    dense, _ = with_processor(1.0)
    sparse, processor = with_processor(None, density=0.2, refresh_every=3)
    texts = [prompt((10,), seed=1), prompt((7,), seed=2)]

    def step(transformer, timestep):
        outs = []
        for text in texts:
            inputs = {
                "encoder_hidden_states": text["prompt_embeds"],
                "encoder_attention_mask": text["prompt_attention_mask"],
                "pooled_projections": text["pooled_prompt_embeds"],
                "hidden_states": LATENTS,
                "timestep": torch.tensor([timestep]),
                "guidance": torch.tensor([6000.0]),
            }
            with torch.no_grad():
                outs.append(transformer(**inputs).sample)
        return outs

    step(sparse, 500.0)
    found = step(sparse, 499.9)
    assert processor.report().refresh_steps == (0,)
    assert len(tensors_of(store_of(processor))) == 2 * NUM_LAYERS
    for one, expected in zip(found, step(dense, 499.9), strict=True):
        torch.testing.assert_close(one, expected, rtol=0, atol=0.01 * expected.abs().max().item())


LATENTS = torch.randn(1, 4, 3, 8, 8, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize(
    "other", [{"lengths": (7,)}, {"lengths": (10, 10)}, {"dtype": torch.bfloat16}], ids=str
)
def test_other_inputs_in_the_middle_of_a_generation_drop_it(other):
    transformer, processor = with_processor(None, density=0.2, refresh_every=5)
    run(transformer, timestep=500.0)
    kept = tensors_of(store_of(processor))
    run(transformer, timestep=400.0)
    if "dtype" in other:
        transformer.to(other["dtype"])
    run(transformer, timestep=300.0, **other)
    assert processor.report().refresh_steps == (0, 2)
    assert all(one() is None for one in kept)


def test_another_size_is_another_generation():
    transformer, processor = with_processor(None, density=0.2, refresh_every=5)
    run(transformer, timestep=500.0)
    kept = tensors_of(store_of(processor))
    run(transformer, timestep=400.0, size=10)
    assert processor.report().refresh_steps == (0,)
    assert all(one() is None for one in kept)


def test_the_end_of_a_pipelines_generation_frees_all():
    pipe = tiny_pipeline()
    processor = enable_xattention(pipe, **OPTIONS).processor
    held = []

    def callback(pipe, step, timestep, tensors):
        held.append(len(tensors_of(store_of(processor))))
        return tensors

    negative = prompt((4,), seed=7, prefix="negative_")
    generate(pipe, 5, callback_on_step_end=callback, true_cfg_scale=3.0, **negative)
    assert held == [2 * NUM_LAYERS, 2 * NUM_LAYERS, 2 * NUM_LAYERS, 0, 0]
    assert store_of(processor)._passes == {}


@pytest.mark.parametrize("end", ["reset", "disable", "another processor", "a generation"])
def test_what_is_kept_is_freed(end):
    transformer = tiny_transformer()
    handle = enable_xattention(transformer, **OPTIONS)
    run(transformer, timestep=900.0)
    run(transformer, timestep=500.0)
    kept = tensors_of(store_of(handle.processor))
    assert len(kept) == NUM_LAYERS
    assert all(one() is not None for one in kept)
    if end == "reset":
        handle.processor.reset()
    elif end == "disable":
        handle.disable()
    elif end == "another processor":
        with_processor(model=transformer)
    else:
        run(transformer, timestep=900.0, seed=1)
    assert all(one() is None for one in kept)
    assert handle.processor.report().refresh_steps == (0,)


@pytest.mark.parametrize("stop", ["interrupt", "exception"])
def test_an_interrupted_generation_leaves_nothing_to_the_next(stop):
    def callback(pipe, step, timestep, tensors):
        if step == 2 and stop == "exception":
            raise InterruptedError
        pipe._interrupt = step == 2
        return tensors

    fresh = tiny_pipeline()
    enable_xattention(fresh, **OPTIONS)
    expected = generate(fresh, 5, seed=1)
    pipe = tiny_pipeline()
    processor = enable_xattention(pipe, **OPTIONS).processor
    try:
        generate(pipe, 6, callback_on_step_end=callback)
    except InterruptedError:
        assert stop == "exception"
    assert torch.equal(generate(pipe, 5, seed=1), expected)
    assert processor.report().refresh_steps == (0, 3)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda it: pickle.loads(pickle.dumps(it))])
def test_a_copy_has_no_residual(duplicate):
    transformer, processor = with_processor(None, density=0.2, refresh_every=5)
    run(transformer, timestep=500.0)
    copied = duplicate(transformer)
    run(copied, timestep=400.0)
    (other,) = {
        id(p): p for p in copied.attn_processors.values() if hasattr(p, "settings")
    }.values()
    assert other is not processor
    assert other.report().refresh_steps == (0,)
    assert len(tensors_of(store_of(processor))) == NUM_LAYERS


def test_compiled_layers_make_no_more_graphs_and_the_same_output():
    def outputs(**options):
        model, _ = with_processor(None, density=0.2, warmup_steps=1, **options)
        counter = CompileCounter()
        if compiled:
            torch.compiler.reset()
            model.compile(backend=counter, fullgraph=True)
        outs = [run(model, timestep=timestep) for timestep in (900.0, 800.0, 700.0, 600.0)]
        return counter.frame_count, outs

    compiled = True
    expected_count, _ = outputs()
    count, found = outputs(refresh_every=2)
    compiled = False
    _, expected = outputs(refresh_every=2)
    assert count == expected_count
    torch.testing.assert_close(found, expected)
    torch.compiler.reset()


def test_on_a_cpu_both_places_are_one():
    latents = []
    for residual in ("device", "host"):
        pipe = tiny_pipeline()
        enable_xattention(pipe, residual=residual, **OPTIONS)
        latents.append(generate(pipe, 5))
    assert torch.equal(*latents)


def test_too_little_host_memory_is_refused_on_a_cpu(monkeypatch):
    transformer, processor = with_processor(None, density=0.2, refresh_every=5)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=1000))
    with pytest.raises(ResidualMemoryError, match="for 4 layers take"):
        run(transformer)
    monkeypatch.undo()
    run(transformer)
    assert processor.report().refresh_steps == (0,)


@pytest.mark.parametrize(
    ("first", "then"),
    [
        ({"mask_every": 2}, {"mask_every": 1, "refresh_every": 2}),
        ({"mask_every": 20, "block_size": 16}, {"block_size": 8}),
        ({"mask_every": 20, "block_size": 8}, {"block_size": 16}),
        ({"refresh_every": 6}, {"token_order": "hilbert"}),
    ],
)
def test_settings_replaced_during_a_run_keep_nothing_of_those_before(first, then):
    options = SMALL | {"warmup_steps": 1, "density": 0.4} | first
    pipe = tiny_pipeline()
    processor = enable_xattention(pipe, **options).processor
    stores = []

    def replace(_, step, *__):
        stores.extend(id(kept) for _, kept in store_of(processor)._passes.values())
        if step == 2:
            processor.settings = dataclasses.replace(processor.settings, **then)
        return {}

    generate(pipe, 6, callback_on_step_end=replace)
    if "refresh_every" in then:
        assert processor.report().refresh_steps
    # The steps after the second have a store of their own.
    assert len(set(stores)) == 2


@pytest.mark.parametrize("item", [0, 1])
def test_another_prompt_of_any_item_discards_the_residuals(item):
    pipe = tiny_pipeline()
    processor = enable_xattention(pipe, **OPTIONS | {"refresh_every": 6}).processor
    other = prompt((10, 10), seed=5)["prompt_embeds"]

    def replace(_, step, __, given):
        given["prompt_embeds"][item] = other[item] if step == 2 else given["prompt_embeds"][item]
        return given

    inputs = {"callback_on_step_end_tensor_inputs": ["prompt_embeds"]}
    generate(pipe, 6, lengths=(10, 10), callback_on_step_end=replace, **inputs)
    assert processor.report().refresh_steps == (0, 3)
