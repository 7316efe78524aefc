"""The one way from a layer's tensors to its attention, whatever the order of its tokens."""

import dataclasses

import pytest
import torch
from diffusers import UniPCMultistepScheduler
from hunyuan import (
    NUM_LAYERS,
    forward_inputs,
    generate,
    run,
    states,
    tiny_pipeline,
    tiny_processor,
    tiny_transformer,
    with_processor,
)
from torch._dynamo.testing import CompileCounter

from xattn_video import UnboundProcessorError, enable_xattention
from xattn_video.policy.decision import Decision
from xattn_video.policy.settings import SparseSettings
from xattn_video.processors import engine
from xattn_video.processors.layout import TokenLayout
from xattn_video.processors.recorder import ForwardPass, LayerSlot

OPTIONS = {"stride": 4, "block_size": 8, "warmup_steps": 2, "min_tokens": 0}
CPU = torch.device("cpu")
PLAIN = TokenLayout(48, 16, (10, 3), CPU)


def attend(layout, tensors, tau=0.6, lengths=None):
    """The engine on its own: output, and the slot that recorded it."""
    slot = LayerSlot("layer")
    slot.reason = "warm-up" if tau is None else None
    slot.threshold = None if tau is None else torch.tensor(tau)
    slot.forward = ForwardPass(
        SparseSettings(**OPTIONS),
        Decision(slot.reason, ((tau or 1.0,),), tau, (False,), (tau is not None,)),
        layout,
        lengths,
        "torch_gather",
        None,
        None,
        engine.sparse_attention,
        (),
    )
    with torch.no_grad():
        return engine.attend(slot, *tensors, None), slot


@pytest.fixture
def tensors():
    return torch.randn(3, 2, 64, 2, 16).mul(2).unbind()


LENGTHS = torch.tensor([58, 51], dtype=torch.int32)


@pytest.mark.parametrize("tau", [None, 0.6], ids=["dense", "sparse"])
def test_any_permutation_of_the_tokens_gives_the_same(tensors, tau):
    expected, plain = attend(PLAIN, tensors, tau, LENGTHS)
    permutation = torch.randperm(64)
    layout = dataclasses.replace(PLAIN, permutation=permutation)
    # The model holds canonical token p at place permutation[p].
    shuffled = [torch.empty_like(t).index_copy_(1, permutation, t) for t in tensors]
    found, slot = attend(layout, shuffled, tau, LENGTHS)
    assert torch.equal(found[:, permutation], expected)
    assert slot.state == plain.state == ("dense" if tau is None else "sparse")
    assert tau is None or slot.kept == plain.kept


@pytest.mark.parametrize("tau", [None, 0.6], ids=["dense", "sparse"])
def test_text_may_come_first(tensors, tau):
    expected, _ = attend(TokenLayout(48, 16, (16, 16), CPU), tensors, tau)
    layout = TokenLayout.text_first(48, 16, 2, CPU)
    found, _ = attend(layout, [t.roll(16, dims=1) for t in tensors], tau)
    assert torch.equal(found, expected.roll(16, dims=1))


@pytest.mark.parametrize("tau", [None, 1 - 1e-7], ids=["dense", "sparse"])
@pytest.mark.parametrize("causal", [False, True])
def test_there_may_be_no_text(tensors, tau, causal):
    layout = TokenLayout(64, 0, (0, 0), CPU, causal=causal)
    found, slot = attend(layout, tensors, tau)
    query, key, value = (tensor.transpose(1, 2) for tensor in tensors)
    expected = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, is_causal=causal
    )
    torch.testing.assert_close(found, expected.transpose(1, 2), rtol=1e-4, atol=1e-5)
    if tau is not None:
        # Both heads and items keep every block that they can see.
        assert slot.kept == 2 * layout.count_valid_blocks(8)


def test_a_causal_layer_sees_nothing_of_what_comes(tensors):
    layout = TokenLayout(64, 0, (0, 0), CPU, causal=True)
    expected, _ = attend(layout, tensors)
    for tensor in tensors[1:]:
        tensor[:, 40:] = 1e3
    found, _ = attend(layout, tensors)
    assert torch.equal(found[:, :40], expected[:, :40])


def test_a_forward_that_went_around_the_hook_is_refused():
    """The settled pass of the forward before would have other text lengths."""
    transformer, _ = with_processor()
    arguments = forward_inputs(lengths=(10,))
    with torch.no_grad():
        transformer(**arguments)
        for call in (
            lambda: transformer.forward(**forward_inputs(lengths=(3,))),
            lambda: transformer.transformer_blocks[0].attn(
                torch.randn(1, 48, 32), encoder_hidden_states=torch.randn(1, 16, 32)
            ),
        ):
            with pytest.raises(UnboundProcessorError, match="call the transformer itself"):
                call()


def test_a_forward_that_failed_leaves_nothing_settled():
    transformer, processor = with_processor()
    handle = transformer.single_transformer_blocks[0].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(transformer)
    handle.remove()
    with pytest.raises(UnboundProcessorError), torch.no_grad():
        transformer.forward(**forward_inputs())
    run(transformer)
    assert states(processor.report())[-1] == "sparse"


def test_an_observer_is_told_of_every_layer():
    transformer, processor = with_processor()
    seen = []
    processor.observers.append(seen.append)
    run(transformer, lengths=(10, 3))
    assert [one.layer for one in seen] == list(processor.layer_names)
    counts = [int(one.blocks.counts.sum()) for one in seen]
    assert counts == [layer.kept for layer in processor.report().forwards[0].layers]


def test_a_pipeline_tells_a_generation_that_starts_below_the_end_of_the_last():
    pipe = tiny_pipeline()
    processor = enable_xattention(pipe, 0.5, **OPTIONS).processor
    generate(pipe, 4, sigmas=[1.0, 0.9, 0.8, 0.7])
    generate(pipe, 3, sigmas=[0.6, 0.4, 0.2])
    report = processor.report()
    assert report.steps == (0, 1, 2)
    assert states(report) == ["dense", "dense", "sparse"]


@pytest.mark.parametrize("bound", [True, False], ids=["pipeline", "transformer"])
def test_equal_timesteps_are_steps_of_their_own(bound):
    """UniPC at shift 17 and 60 steps begins 999, 999, 997."""
    pipe = tiny_pipeline()
    pipe.scheduler = UniPCMultistepScheduler(
        use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=17.0
    )
    model = pipe if bound else pipe.transformer
    processor = enable_xattention(model, 0.5, **(OPTIONS | {"warmup_steps": 5})).processor
    generate(pipe, 60)
    assert pipe.scheduler.timesteps[0] == pipe.scheduler.timesteps[1]
    report = processor.report()
    # A transformer alone cannot tell the first two from two generations of one step.
    assert len(report.steps) == (60 if bound else 59)
    assert states(report)[:6] == ["dense"] * 5 + ["sparse"]


def test_true_guidance_with_a_pipeline_runs_two_passes_a_step():
    from hunyuan import prompt

    pipe = tiny_pipeline()
    processor = enable_xattention(pipe, 0.5, **OPTIONS).processor
    for num_steps in (1, 4):
        negative = prompt((4,), seed=7, prefix="negative_")
        generate(pipe, num_steps, true_cfg_scale=3.0, **negative)
        found = [(one.step, one.forward_pass) for one in processor.report().forwards]
        assert found == [(step, number) for step in range(num_steps) for number in range(2)]


@pytest.mark.parametrize("whole", [True, False], ids=["whole", "blocks"])
def test_sizes_and_batches_make_no_more_graphs_than_stock(whole):
    """Five sizes and batches, each with dense and sparse steps."""

    def count(processor):
        torch.compiler.reset()
        model = tiny_transformer()
        if processor is not None:
            model.set_attn_processor(processor)
        counter = CompileCounter()
        if whole:
            model.compile(backend=counter, fullgraph=True)
        else:
            model.compile_repeated_blocks(backend=counter, fullgraph=True)
        for size, lengths in ((8, (10,)), (10, (10,)), (12, (4, 7)), (14, (3,)), (6, (1, 9))):
            for timestep in (900.0, 600.0, 300.0):
                run(model, size=size, lengths=lengths, timestep=timestep)
        return counter.frame_count

    expected = count(None)
    processor = tiny_processor(warmup_steps=1)
    assert count(processor) == expected
    torch.compiler.reset()


def test_export_is_refused_in_words():
    transformer, _ = with_processor()
    with pytest.raises(NotImplementedError, match=r"torch\.export is not supported"):
        torch.export.export(transformer, (), forward_inputs(), strict=False)


def test_every_layer_records_what_it_did():
    transformer, processor = with_processor(warmup_steps=1)
    run(transformer)
    run(transformer, timestep=400.0)
    first, second = processor.report().forwards
    assert [layer.reason for layer in first.layers] == ["warm-up"] * NUM_LAYERS
    assert all(layer.state == "sparse" and layer.kept for layer in second.layers)
