"""The warm-up is dense and the rest sparse, whatever runs the transformer and in what order."""

import copy
import pickle

import pytest
import torch
from accelerate import cpu_offload, cpu_offload_with_hook
from diffusers import FirstBlockCacheConfig, HunyuanVideoPipeline
from diffusers.models.attention_dispatch import AttentionBackendName
from hunyuan import (
    NUM_LAYERS,
    SIZE,
    generate,
    prompt,
    states,
    tiny_pipeline,
    tiny_processor,
    tiny_transformer,
)
from torch._dynamo.testing import CompileCounter
from torch._dynamo.utils import counters

from xattn_video import enable_xattention
from xattn_video.processors.session import _layer_device


class StopHereError(RuntimeError):
    """What a callback raises to stop a generation."""


def sparse_pipeline(transformer=None, **options):
    """A pipeline with a processor that is dense for two steps."""
    pipe = tiny_pipeline(transformer)
    processor = tiny_processor(**options)
    pipe.transformer.set_attn_processor(processor)
    return pipe, processor


def warm_then_sparse(num_steps, warmup=2, passes=1):
    """The states of a generation's forward passes."""
    return ["dense"] * (warmup * passes) + ["sparse"] * ((num_steps - warmup) * passes)


def assert_right(processor, num_steps, **options):
    report = processor.report()
    assert states(report) == warm_then_sparse(num_steps, **options)
    assert report.steps == tuple(range(num_steps))
    assert set(report.dense_reasons) == {"warm-up"}


@pytest.fixture(scope="module")
def expected():
    """The latents of a plain sparse generation of four steps."""
    pipe, _ = sparse_pipeline()
    return generate(pipe)


@pytest.mark.parametrize("counts", [(4, 3, 6), (20, 50), (50, 20), (1, 1, 4)], ids=str)
def test_generations_in_a_row_each_warm_up(counts):
    pipe, processor = sparse_pipeline()
    for num_steps in counts:
        generate(pipe, num_steps)
        assert_right(processor, num_steps, warmup=min(2, num_steps))


def test_the_default_warm_up_is_five_steps_of_fifty_in_bfloat16():
    """The timesteps that the pipeline hands over in bfloat16 are 1000, 996, 996, 992 ..."""
    pipe, processor = sparse_pipeline(tiny_transformer().to(torch.bfloat16), warmup_steps=5)
    generate(pipe, 6)
    generate(pipe, 50)
    assert_right(processor, 50, warmup=5)
    timesteps = [forward.timestep for forward in processor.report().forwards]
    assert timesteps[1] == timesteps[2]


@pytest.mark.parametrize("stop", [0, 1, 3])
def test_a_generation_after_an_exception_warms_up(stop):
    def callback(pipe, step, timestep, tensors):
        if step == stop:
            raise StopHereError
        return tensors

    pipe, processor = sparse_pipeline()
    with pytest.raises(StopHereError):
        generate(pipe, 6, callback_on_step_end=callback)
    assert states(processor.report()) == warm_then_sparse(6)[: stop + 1]
    generate(pipe, 4, seed=1)
    assert_right(processor, 4)


def test_a_generation_after_an_exception_inside_a_layer_warms_up():
    pipe, processor = sparse_pipeline()
    handle = pipe.transformer.single_transformer_blocks[0].register_forward_pre_hook(
        lambda *_: (_ for _ in ()).throw(StopHereError)
    )
    with pytest.raises(StopHereError):
        generate(pipe)
    found = [run.state for run in processor.report().forwards[0].layers]
    assert found == ["dense", "dense", "skipped", "skipped"]
    handle.remove()
    generate(pipe, seed=1)
    assert_right(processor, 4)


@pytest.mark.parametrize("stop", [0, 3])
def test_a_generation_after_an_interrupted_one_warms_up(stop):
    def callback(pipe, step, timestep, tensors):
        pipe._interrupt = step == stop
        return tensors

    pipe, processor = sparse_pipeline()
    generate(pipe, 6, callback_on_step_end=callback)
    assert states(processor.report()) == warm_then_sparse(6)[: stop + 1]
    generate(pipe, 4, seed=1)
    assert_right(processor, 4)


def test_reset_starts_a_generation_that_the_timesteps_do_not_show():
    pipe, processor = sparse_pipeline()
    generate(pipe, 4, sigmas=[1.0, 0.9, 0.8, 0.7])
    processor.reset()
    assert processor.step_index is None
    generate(pipe, 3, sigmas=[0.6, 0.4, 0.2])
    assert_right(processor, 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_true_guidance_runs_two_passes_a_step(dtype):
    pipe, processor = sparse_pipeline(tiny_transformer().to(dtype))
    for num_steps in (1, 5, 4):
        negative = prompt((4,), seed=7, prefix="negative_")
        generate(pipe, num_steps, true_cfg_scale=3.0, **negative)
        assert_right(processor, num_steps, warmup=min(2, num_steps), passes=2)
    assert [forward.forward_pass for forward in processor.report().forwards] == [0, 1] * 4


def test_a_batch_of_two_prompts_runs():
    pipe, processor = sparse_pipeline()
    assert generate(pipe, lengths=(10, 4)).shape[0] == 2
    assert_right(processor, 4)


def test_two_videos_of_one_prompt_run():
    pipe, processor = sparse_pipeline()
    assert generate(pipe, num_videos_per_prompt=2).shape[0] == 2
    assert_right(processor, 4)


@pytest.mark.parametrize("guidance_embeds", [True, False])
def test_guidance_embeds_change_nothing(guidance_embeds):
    pipe, processor = sparse_pipeline(tiny_transformer(guidance_embeds=guidance_embeds))
    generate(pipe)
    assert_right(processor, 4)


def test_another_size_warms_up():
    pipe, processor = sparse_pipeline()
    generate(pipe, 4)
    generate(pipe, 3, width=2 * SIZE, height=SIZE + 16, num_frames=13)
    assert_right(processor, 3)


@pytest.mark.parametrize("set_first", [True, False])
def test_model_offloading_runs(expected, set_first):
    pipe = tiny_pipeline()
    processor = tiny_processor()
    if set_first:
        pipe.transformer.set_attn_processor(processor)
    cpu_offload_with_hook(pipe.transformer, execution_device="cpu")
    if not set_first:
        pipe.transformer.set_attn_processor(processor)
    for _ in range(2):
        torch.testing.assert_close(generate(pipe), expected)
        assert_right(processor, 4)


def test_offloading_says_where_the_layers_compute():
    """The inputs are still on the host when a forward pass is planned."""
    transformer = tiny_transformer()
    host = torch.device("cpu")
    assert _layer_device(transformer, host) == host
    cpu_offload_with_hook(transformer, execution_device="meta")
    assert _layer_device(transformer, host) == torch.device("meta")


@pytest.mark.parametrize("set_first", [True, False])
def test_sequential_offloading_runs(expected, set_first):
    pipe = tiny_pipeline()
    processor = tiny_processor()
    if set_first:
        pipe.transformer.set_attn_processor(processor)
    cpu_offload(pipe.transformer, execution_device=torch.device("cpu"))
    if not set_first:
        pipe.transformer.set_attn_processor(processor)
    assert next(pipe.transformer.parameters()).is_meta
    for _ in range(2):
        torch.testing.assert_close(generate(pipe), expected)
        assert_right(processor, 4)


@pytest.mark.parametrize(
    "options",
    [{"offload_type": "block_level", "num_blocks_per_group": 1}, {}],
    ids=["block", "leaf"],
)
@pytest.mark.parametrize("set_first", [True, False])
def test_group_offloading_runs(expected, options, set_first):
    pipe = tiny_pipeline()
    processor = tiny_processor()
    if set_first:
        pipe.transformer.set_attn_processor(processor)
    pipe.transformer.enable_group_offload(
        onload_device=torch.device("cpu"), **({"offload_type": "leaf_level"} | options)
    )
    if not set_first:
        pipe.transformer.set_attn_processor(processor)
    for _ in range(2):
        torch.testing.assert_close(generate(pipe), expected)
        assert_right(processor, 4)


def test_layerwise_casting_runs():
    pipe, processor = sparse_pipeline(tiny_transformer().to(torch.bfloat16))
    pipe.transformer.enable_layerwise_casting(torch.float8_e4m3fn, torch.bfloat16)
    for _ in range(2):
        assert generate(pipe).isfinite().all()
        assert_right(processor, 4)


def test_layers_that_a_cache_skips_are_reported_and_steps_still_count():
    pipe, processor = sparse_pipeline()
    # Whatever the first layer says, the others run at the first step alone.
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=1e9))
    for num_steps in (6, 4):
        generate(pipe, num_steps)
        report = processor.report()
        first, *others = zip(*[forward.layers for forward in report.forwards], strict=True)
        assert [run.state for run in first] == warm_then_sparse(num_steps)
        for layer in others:
            assert [run.state for run in layer] == ["dense", *["skipped"] * (num_steps - 1)]
    assert report.summary().startswith("2/4 steps x 1/4 layers sparse")


def test_a_copy_made_in_the_middle_starts_anew():
    copies = []

    def callback(pipe, step, timestep, tensors):
        if step == 2:
            processor = pipe.transformer.transformer_blocks[0].attn.processor
            copies.extend([copy.deepcopy(processor), pickle.loads(pickle.dumps(processor))])
        return tensors

    pipe, processor = sparse_pipeline()
    generate(pipe, callback_on_step_end=callback)
    assert_right(processor, 4)
    for twin in copies:
        other = tiny_pipeline()
        other.transformer.set_attn_processor(twin)
        generate(other, 3)
        assert_right(twin, 3)


def test_saving_in_between_changes_nothing(expected, tmp_path):
    pipe, processor = sparse_pipeline()
    generate(pipe)
    pipe.transformer.save_pretrained(tmp_path)
    torch.testing.assert_close(generate(pipe), expected)
    assert_right(processor, 4)


def test_the_last_steps_cool_down_whatever_their_number():
    pipe = tiny_pipeline()
    processor = enable_xattention(
        pipe, 0.5, stride=4, block_size=8, warmup_steps=1, cooldown_steps=2, min_tokens=0
    ).processor
    for num_steps in (5, 7):
        generate(pipe, num_steps)
        found = states(processor.report())
        assert found == ["dense", *["sparse"] * (num_steps - 3), "dense", "dense"]
    reasons = {"warm-up": NUM_LAYERS, "cool-down": 2 * NUM_LAYERS}
    assert processor.report().dense_reasons == reasons


def compile_whole(pipe, backend):
    pipe.transformer = torch.compile(pipe.transformer, backend=backend, fullgraph=True)


def compile_in_place(pipe, backend):
    pipe.transformer.compile(backend=backend, fullgraph=True)


def compile_blocks(pipe, backend):
    pipe.transformer.compile_repeated_blocks(backend=backend, fullgraph=True)


@pytest.mark.parametrize(
    ("compile_with", "num_graphs"),
    # As many as the stock model's: its blocks get two layouts.
    [(compile_whole, 1), (compile_in_place, 1), (compile_blocks, 5)],
)
def test_a_compiled_transformer_has_one_variant_and_no_graph_break(compile_with, num_graphs):
    """Whatever the thresholds of the steps and the lengths of the prompts."""
    torch.compiler.reset()
    counters.clear()
    pipe, processor = sparse_pipeline(threshold=[0.9, 0.8, 0.7, 0.5, 0.4])
    lengths = [(10,), (3,), (7,)]
    eager = [generate(pipe, 5, lengths=length) for length in lengths]
    backend = CompileCounter()
    compile_with(pipe, backend)
    for expected, length in zip(eager, lengths, strict=True):
        torch.testing.assert_close(generate(pipe, 5, lengths=length), expected)
        assert_right(processor, 5)
    assert backend.frame_count == num_graphs
    assert not counters["graph_break"]
    torch.compiler.reset()


def test_a_compiled_dense_step_uses_the_attention_backend_that_was_set():
    torch.compiler.reset()
    pipe, _ = sparse_pipeline(threshold=1.0)
    expected = generate(pipe, 2)
    for block in pipe.transformer.transformer_blocks:
        block.attn.processor._attention_backend = AttentionBackendName._NATIVE_MATH
    compile_blocks(pipe, CompileCounter())
    torch.testing.assert_close(generate(pipe, 2), expected)
    torch.compiler.reset()


@pytest.mark.slow
def test_inductor_runs_it():
    torch.compiler.reset()
    pipe, processor = sparse_pipeline()
    expected = generate(pipe, 4)
    pipe.transformer.compile_repeated_blocks(fullgraph=True)
    torch.testing.assert_close(generate(pipe, 4), expected, rtol=1e-4, atol=1e-4)
    assert_right(processor, 4)
    torch.compiler.reset()


def stop_at(number):
    def callback(pipe, step, timestep, tensors):
        if step == number:
            raise StopHereError
        return tensors

    return callback


@pytest.mark.parametrize("stop", [0, 1, 5])
@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_another_pipeline_counts_right_after_an_exception_in_the_bound_one(stop, guidance):
    bound = tiny_pipeline()
    options = {"stride": 4, "block_size": 8, "min_tokens": 0}
    processor = enable_xattention(bound, 0.5, warmup_steps=2, **options).processor
    with pytest.raises(StopHereError):
        generate(bound, 6, callback_on_step_end=stop_at(stop))
    other = HunyuanVideoPipeline(
        **{**bound.components, "scheduler": copy.deepcopy(bound.scheduler)}
    )
    negative = prompt((4,), seed=7, prefix="negative_")
    for seed in range(3):
        generate(other, 6, seed=seed, true_cfg_scale=guidance, **negative)
        passes = 2 if guidance > 1 else 1
        expected = [step for step in range(6) for _ in range(passes)]
        assert [forward.step for forward in processor.report().forwards] == expected
        assert len(processor.report().sparse_steps) == 4


def test_the_steps_of_a_stopped_generation_are_not_those_of_another_pipeline():
    bound = tiny_pipeline()
    options = {"stride": 4, "block_size": 8, "min_tokens": 0, "cooldown_steps": 1}
    processor = enable_xattention(bound, 0.5, warmup_steps=1, **options).processor
    with pytest.raises(StopHereError):
        generate(bound, 4, callback_on_step_end=stop_at(1))
    with pytest.raises(ValueError, match="needs the number of denoising steps"):
        generate(HunyuanVideoPipeline(**bound.components), 8)
    generate(bound, 5)
    assert states(processor.report()) == ["dense", *["sparse"] * 3, "dense"]
