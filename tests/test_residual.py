"""A refresh keeps what the skipped blocks add to a layer's output, and later steps add it."""

import copy
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
from xattn_video.policy.decision import Decision
from xattn_video.policy.settings import SparseSettings
from xattn_video.processors import engine
from xattn_video.processors.layout import TokenLayout
from xattn_video.processors.recorder import ForwardPass, LayerSlot
from xattn_video.processors.residual import PassResiduals, Residual, ResidualStore, choose_place

SMALL = {"stride": 4, "block_size": 8, "min_tokens": 0}
OPTIONS = SMALL | {"warmup_steps": 1, "density": 0.2, "refresh_every": 3}


def store_of(processor) -> ResidualStore:
    return processor._session._residuals


def tensors_of(store) -> list[weakref.ref]:
    """Weak references to all that is kept."""
    passes = [residuals for _, residuals in store._passes.values()]
    return [weakref.ref(one.values) for kept in passes for one in kept._kept.values()]


def attend(tensors, residuals, refreshes, sparse=True, last=False, device="cpu"):
    """The engine on its own, on a batch of two with uneven text."""
    settings = SparseSettings(**OPTIONS)
    slot = LayerSlot("layer")
    slot.reason = None if sparse else "warm-up"
    slot.threshold = torch.tensor(settings.density, device=device)
    slot.forward = ForwardPass(
        settings,
        Decision(slot.reason, ((0.2, 0.2),), None, refreshes, last),
        TokenLayout(48, 16, (10, 3), torch.device(device)),
        torch.tensor([58, 51], dtype=torch.int32, device=device),
        "torch_gather",
        None,
        None,
        engine.sparse_attention,
        (),
        residuals,
    )
    with torch.no_grad():
        return engine.attend(slot, *tensors, None)


def three_tensors(device="cpu", dtype=torch.float32):
    return torch.randn(3, 2, 64, 2, 16).mul(2).to(device, dtype).unbind()


def test_a_refresh_gives_dense_attention_and_the_next_step_too_within_8_bits():
    tensors = three_tensors()
    dense = attend(tensors, None, False, sparse=False)
    approximate = attend(tensors, None, False)
    residuals = PassResiduals("auto", 1)
    assert torch.equal(attend(tensors, residuals, True), dense)
    found = attend(tensors, residuals, False)
    largest = (dense - approximate).abs().amax(-1, keepdim=True)
    assert ((found - dense).abs() <= largest / 127 * 0.501 + 1e-6).all()
    # The residual is no trifle, and it is far more than what 8 bits lose.
    assert (approximate - dense).abs().mean() > 50 * (found - dense).abs().mean()


def test_other_inputs_get_the_residual_of_the_refresh():
    before, now = three_tensors(), three_tensors()
    residual = attend(before, None, False, sparse=False) - attend(before, None, False)
    residuals = PassResiduals("device", 1)
    attend(before, residuals, True)
    error = attend(now, residuals, False) - attend(now, None, False) - residual
    assert (error.abs() <= residual.abs().amax(-1, keepdim=True) / 127 * 0.501 + 1e-6).all()


def test_a_layer_without_a_residual_refreshes_at_any_step():
    tensors = three_tensors()
    residuals = PassResiduals("auto", 1)
    dense = attend(tensors, None, False, sparse=False)
    assert torch.equal(attend(tensors, residuals, False), dense)
    assert residuals.holds("layer")


def test_the_last_sparse_step_keeps_nothing():
    residuals = PassResiduals("auto", 1)
    attend(three_tensors(), residuals, True, last=True)
    assert not residuals.holds("layer")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_8_bits_hold_a_residual(dtype):
    dense, approximate = torch.randn(2, 1, 5, 2, 16).mul(3).to(dtype).unbind()
    approximate[0, 1], dense[0, 2, 0] = dense[0, 1], dense[0, 2, 0] + 1e-4
    kept = Residual.between(dense, approximate)
    assert kept.values.dtype == torch.int8
    assert kept.scales.shape == (1, 5, 2, 1)
    largest = (dense.float() - approximate.float()).abs().amax(-1, keepdim=True)
    error = (kept.added_to(approximate).float() - dense.float()).abs()
    rounding = 2 * torch.finfo(dtype).eps * (largest + dense.float().abs())
    assert (error <= largest / 127 * 0.501 + rounding).all()
    assert torch.equal(kept.added_to(approximate)[0, 1], dense[0, 1])


def test_what_is_not_finite_stays_so():
    dense, approximate = torch.randn(2, 1, 2, 1, 4).unbind()
    dense[0, 0, 0, 1] = torch.nan
    approximate[0, 1, 0, 2] = torch.inf
    found = Residual.between(dense, approximate).added_to(torch.ones_like(dense))
    assert found.isnan().all()


def test_autocast_changes_no_dtype():
    dense, approximate = torch.randn(2, 1, 5, 2, 16).bfloat16().unbind()
    with torch.autocast("cpu", torch.bfloat16):
        kept = Residual.between(dense, approximate)
        assert kept.added_to(approximate).dtype == kept.scales.dtype == torch.bfloat16


def test_a_refresh_at_every_step_is_dense_attention():
    sparse, dense = tiny_pipeline(), tiny_pipeline()
    processor = enable_xattention(sparse, **OPTIONS | {"refresh_every": 1}).processor
    enable_xattention(dense, 1.0, **SMALL)
    assert torch.equal(generate(sparse), generate(dense))
    assert processor.report().refresh_steps == (1, 2, 3)
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
    assert report.refresh_steps == (1, 4)
    refreshed = [run.refreshed for forward in report.forwards for run in forward.layers]
    expected = [step in (1, 4) for step in range(6)]
    assert refreshed == [one for one in expected for _ in range(NUM_LAYERS)]
    density = report.forwards[2].layers[0].density
    # By hand: 48 video and 10 text tokens make 8 rows of 8 blocks, 2 of them of text. Of the six
    # video rows two text blocks are forced and fill the share of round(0.2 * 8) = 2.
    assert density == (6 * 2 + 2 * 8) / 64
    assert report.density == density
    assert report.budget == pytest.approx((3 * density + 2) / 5)
    assert "budget 0.66 with 2 refreshed" in report.summary()


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
    assert held == [0, 2 * NUM_LAYERS, 2 * NUM_LAYERS, 2 * NUM_LAYERS, 0]
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
    assert handle.processor.report().refresh_steps == (() if end == "a generation" else (1,))


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
    assert processor.report().refresh_steps == (1, 4)


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


# A layer of HunyuanVideo at 720x1280x129 on a GPU: 20.8 GiB of residuals, 12.3 of activations.
LAYER = SimpleNamespace(
    shape=(1, 119_056, 24, 128),
    is_cuda=True,
    device=torch.device("cuda"),
    element_size=lambda: 2,
    nbytes=119_056 * 3072 * 2,
)


@pytest.mark.parametrize(
    ("asked", "device_gib", "host_gib", "expected"),
    [
        ("auto", 34, 0, "device"),
        ("auto", 33, 21, "host"),
        ("auto", 33, 20, "20.8 GiB, and there are 20.7 on the device and 20.0 on the host"),
        ("device", 21, 0, "device"),
        ("device", 20, 99, "20.8 GiB, and there are 20.0 on the device; make the video smaller"),
        ("host", 0, 21, "host"),
        ("host", 99, 20, "20.8 GiB, and there are 20.0 on the host; make the video smaller"),
    ],
)
def test_the_place_is_where_there_is_room(monkeypatch, asked, device_gib, host_gib, expected):
    host = SimpleNamespace(available=host_gib * 2**30)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: host)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: ((device_gib - 3) * 2**30, 0))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 5 * 2**30)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: 2 * 2**30)
    if expected in ("device", "host"):
        assert choose_place(asked, LAYER, 60) == expected
    else:
        with pytest.raises(ResidualMemoryError, match=expected):
            choose_place(asked, LAYER, 60)


def test_too_little_host_memory_is_refused_on_a_cpu(monkeypatch):
    transformer, processor = with_processor(None, density=0.2, refresh_every=5)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=1000))
    with pytest.raises(ResidualMemoryError, match="for 4 layers take"):
        run(transformer)
    monkeypatch.undo()
    run(transformer)
    assert processor.report().refresh_steps == (0,)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_host_memory_gives_what_the_device_gives(dtype, device):
    """Many layers without a wait in between, so that the copies have to keep their order."""
    layers = [torch.randn(2, 2, 3000, 8, 64, device=device).to(dtype) for _ in range(12)]
    places = [PassResiduals(place, len(layers)) for place in ("device", "host")]
    for _ in range(3):
        for residuals in places:
            for number, (dense, approximate) in enumerate(layers):
                residuals.keep(str(number), dense, approximate)
        found = []
        for residuals in places:
            found.append([])
            for number, (_, approximate) in enumerate(layers):
                residuals.fetch(str(number), approximate.device)
                found[-1].append(residuals.add(str(number), approximate))
        for device_out, host_out, (dense, _) in zip(*found, layers, strict=True):
            assert torch.equal(device_out, host_out)
            torch.testing.assert_close(host_out, dense, rtol=0, atol=0.08)


@pytest.mark.gpu
def test_no_layer_waits_for_the_device(device):
    for place in ("device", "host"):
        residuals = PassResiduals(place, 4)
        dense, approximate = torch.randn(2, 1, 512, 4, 64, device=device).unbind()
        for _ in range(2):
            # Pinned memory is made once; later it is reused.
            residuals.keep("layer", dense, approximate)
            residuals.fetch("layer", dense.device)
            residuals.add("layer", approximate)
            torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            residuals.keep("layer", dense, approximate)
            residuals.fetch("layer", dense.device)
            residuals.add("layer", approximate)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_host_residuals_leave_two_buffers_on_the_device(device):
    dense, approximate = torch.randn(2, 1, 4096, 24, 128, device=device).bfloat16().unbind()
    residuals = PassResiduals("host", 20)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    for layer in range(20):
        residuals.keep(str(layer), dense, approximate)
    torch.cuda.synchronize()
    one = dense.nbytes // 2 * 130 // 128
    assert torch.cuda.memory_allocated() - before <= 2.1 * one
