import pytest
import torch
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
from hunyuan import (
    HEADS,
    NUM_LAYERS,
    TEXT_TOKENS,
    VIDEO_TOKENS,
    forward_inputs,
    run,
    states,
    tiny_processor,
    tiny_transformer,
    with_processor,
)

from xattn_video import ThresholdSchedule
from xattn_video.policy import settings
from xattn_video.processors import engine

STOCK_REFINER = "context_embedder.token_refiner.refiner_blocks.0.attn"


def dispatched(monkeypatch):
    """Queries' and keys' sizes and the options of each call of Diffusers' dispatch from now on."""
    calls, dispatch = [], engine.dispatch_attention_fn

    def spy(query, key, value, **options):
        calls.append((query.shape[:2], key.shape[:2], options))
        return dispatch(query, key, value, **options)

    monkeypatch.setattr(engine, "dispatch_attention_fn", spy)
    return calls


def backends(calls):
    return [options["backend"] for _, _, options in calls]


# Dense steps


@pytest.mark.parametrize("lengths", [(TEXT_TOKENS,), (10,), (1,), (10, 10), (10, 3), (5, 1, 16)])
def test_a_dense_step_gives_what_the_stock_processor_gives(lengths):
    expected = run(tiny_transformer(), lengths=lengths)
    transformer, processor = with_processor(1.0)
    torch.testing.assert_close(run(transformer, lengths=lengths), expected, rtol=1e-5, atol=1e-5)
    assert processor.report().dense_reasons == {"threshold 1": NUM_LAYERS}


def test_a_dense_step_without_padding_is_the_stock_one_bit_for_bit():
    """Nothing is cut then: the same kernel runs on the same tensors, without a mask."""
    transformer = tiny_transformer()
    stock = transformer.attn_processors["transformer_blocks.0.attn.processor"]
    attn = transformer.transformer_blocks[0].attn
    seen = []
    attn.register_forward_hook(lambda *call: seen.append(call[2:]), with_kwargs=True)
    transformer, _ = with_processor(1.0, transformer)
    run(transformer, lengths=(TEXT_TOKENS, TEXT_TOKENS))
    ((arguments, found),) = seen
    with torch.no_grad():
        expected = stock(attn, **(arguments | {"attention_mask": None}))
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])


def test_a_dense_step_runs_without_a_mask_on_the_valid_keys(monkeypatch):
    calls = dispatched(monkeypatch)
    transformer, _ = with_processor(1.0)
    run(transformer, lengths=(10, 10))
    whole = VIDEO_TOKENS + TEXT_TOKENS
    assert calls == [((2, whole), (2, VIDEO_TOKENS + 10), {"backend": None})] * NUM_LAYERS
    calls.clear()
    run(transformer, lengths=(10, 3))
    assert [key for _, key, _ in calls[:2]] == [(1, VIDEO_TOKENS + 10), (1, VIDEO_TOKENS + 3)]
    assert all("attn_mask" not in options for _, _, options in calls)


def test_a_dense_step_uses_the_attention_backend_that_was_set(monkeypatch):
    calls = dispatched(monkeypatch)
    transformer, _ = with_processor(1.0)
    expected = run(transformer)
    try:
        transformer.set_attention_backend("_native_math")
        torch.testing.assert_close(run(transformer), expected)
        assert backends(calls[-NUM_LAYERS:]) == [AttentionBackendName._NATIVE_MATH] * NUM_LAYERS
        transformer.reset_attention_backend()
        run(transformer)
        assert backends(calls[-NUM_LAYERS:]) == [None] * NUM_LAYERS
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


def test_how_few_depends_on_the_device_where_nothing_is_said(monkeypatch):
    transformer, processor = with_processor(min_tokens=None)
    run(transformer)
    assert processor.report().dense_reasons == {"too few tokens": NUM_LAYERS}
    monkeypatch.setattr(settings, "_MIN_TOKENS_ELSEWHERE", VIDEO_TOKENS)
    transformer, processor = with_processor(min_tokens=None)
    run(transformer)
    assert states(processor.report()) == ["sparse"]


def test_gradients_use_the_attention_backend_that_was_set(monkeypatch):
    calls = dispatched(monkeypatch)
    transformer, processor = with_processor()
    processor._attention_backend = AttentionBackendName._NATIVE_MATH
    transformer.requires_grad_(True)
    transformer(**forward_inputs())
    assert backends(calls) == [AttentionBackendName._NATIVE_MATH] * NUM_LAYERS


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


@pytest.mark.parametrize("trained", ["last block", "output", "latents"])
def test_no_layer_is_sparse_where_anything_needs_gradients(trained):
    """Else what is trained would learn from the outputs of sparse layers before it."""

    def gradient(transformer):
        arguments = forward_inputs(lengths=(10, 3))
        leaf = {
            "last block": transformer.single_transformer_blocks[-1].proj_out.weight,
            "output": transformer.proj_out.weight,
            "latents": arguments["hidden_states"],
        }[trained].requires_grad_(True)
        transformer(**arguments).sample.square().sum().backward()
        return leaf.grad

    expected = gradient(tiny_transformer())
    transformer, processor = with_processor()
    assert torch.equal(gradient(transformer), expected)
    assert processor.report().dense_reasons == {"gradients": NUM_LAYERS}
    run(transformer)
    assert states(processor.report()) == ["sparse"]


def test_gradients_that_a_hook_brings_in_run_dense():
    transformer, processor = with_processor()
    block = transformer.single_transformer_blocks[0]
    block.attn.to_q.register_forward_hook(lambda *call: call[2].requires_grad_())
    transformer(**forward_inputs())
    found = [layer.reason for layer in processor.report().forwards[0].layers]
    assert found == [None, None, "gradients", "gradients"]


# Sparse steps


@pytest.mark.parametrize("lengths", [(TEXT_TOKENS,), (10,), (1,), (10, 10), (10, 3), (5, 1, 16)])
def test_a_sparse_step_that_keeps_every_block_equals_the_dense_one(lengths):
    expected = run(tiny_transformer(), lengths=lengths)
    # One head below 1 makes a layer sparse; its threshold still keeps all.
    heads = {(layer, 0): ((0, 1 - 1e-7),) for layer in range(NUM_LAYERS)}
    schedule = ThresholdSchedule(((0, 1.0),), heads=heads)
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


def test_a_pass_in_which_no_layer_ran_names_no_backend():
    transformer, processor = with_processor()
    handle = transformer.transformer_blocks[0].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(transformer)
    assert processor.report().backends == ()
    handle.remove()
    run(transformer)
    assert [forward.backend for forward in processor.report().forwards] == ["torch_gather"]


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


@pytest.mark.parametrize("lengths", [(10,), (10, 3)])
def test_scores_in_eight_bits_choose_nearly_the_same(lengths):
    pytest.importorskip("triton")
    found, densities = [], []
    for precision in ("exact", "float8"):
        torch.manual_seed(0)
        transformer, processor = with_processor(
            0.8, block_size=64, stride=8, scoring_precision=precision
        )
        found.append(run(transformer, lengths=lengths, size=20))
        densities.append(processor.report().density)
    exact, rounded = found
    assert 0 < (rounded - exact).norm() < 0.1 * exact.norm()
    assert abs(densities[0] - densities[1]) < 0.05
    assert densities[0] < 0.9


@pytest.mark.gpu
@pytest.mark.parametrize("lengths", [(10,), (10, 3)])
@pytest.mark.parametrize(
    ("threshold", "precision"), [(1.0, "exact"), (0.9, "exact"), (0.9, "float8")]
)
def test_a_layer_never_waits_for_the_gpu(lengths, threshold, precision):
    model = tiny_transformer(attention_head_dim=64, rope_axes_dim=(16, 24, 24))
    model = model.to("cuda", torch.bfloat16)
    transformer, processor = with_processor(
        threshold, model, stride=8, block_size=64, scoring_precision=precision
    )
    arguments = forward_inputs(lengths=lengths, size=32, dtype=torch.bfloat16)
    arguments = {name: value.cuda() for name, value in arguments.items()}
    with torch.no_grad():
        # Kernels compile, and may wait, when they first run.
        transformer(**arguments)
        for name, module in transformer.named_modules():
            if name.endswith("attn"):
                module.register_forward_pre_hook(
                    lambda *_: torch.cuda.set_sync_debug_mode("error")
                )
                module.register_forward_hook(
                    lambda *_: torch.cuda.set_sync_debug_mode("default"), always_call=True
                )
        transformer(**arguments)
    assert states(processor.report()) == ["dense" if threshold == 1 else "sparse"]
