"""A generation: what is checked before, what is recorded during it."""

import inspect
import time
from dataclasses import fields, replace
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from diffusers import HunyuanVideoPipeline

from xattn_video import ThresholdSchedule, XAttnProcessor
from xattn_video.pipelines import generation, loading
from xattn_video.pipelines.generation import (
    GenerationResult,
    StepRecord,
    generate,
    generate_together,
)
from xattn_video.pipelines.loading import LoadOptions, load_pipeline
from xattn_video.pipelines.request import GenerationRequest, VideoSettings
from xattn_video.policy.decision import Run, count_steps
from xattn_video.policy.settings import SparseSettings

SMALL = VideoSettings(height=64, width=64, num_frames=9, num_inference_steps=4)
SPARSE = SparseSettings(threshold=0.8, block_size=16, warmup_steps=2, min_tokens=0)


@pytest.fixture(scope="module")
def pipe(tiny_pipeline):
    pipe = load_pipeline(LoadOptions(str(tiny_pipeline), torch.float32, "cpu"))
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def pretend_cuda(monkeypatch):
    """Options that name a CUDA device are accepted; nothing is put on it."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)


def request(**options):
    return GenerationRequest("a red circle", **{"video": SMALL, "sparse": SPARSE} | options)


def test_sparse_settings_are_the_processors():
    ours = {knob.name: knob.default for knob in fields(SparseSettings)}
    parameters = inspect.signature(XAttnProcessor).parameters
    assert ours == {name: parameter.default for name, parameter in parameters.items()}


def test_every_step_is_recorded(pipe):
    seen = []
    result = generate(pipe, request(), seen.append)
    assert result.frames.shape == (9, 64, 64, 3)
    assert result.frames.dtype == np.uint8
    assert tuple(seen) == result.steps
    assert [step.index for step in result.steps] == [0, 1, 2, 3]
    assert [step.sparse for step in result.steps] == [False, False, True, True]
    assert [step.density is None for step in result.steps] == [True, True, False, False]
    assert all(step.seconds > 0 for step in result.steps)
    assert result.dense_seconds + result.sparse_seconds < result.seconds
    assert result.peak_memory_gib > 0
    assert result.report.sparse_steps == (2, 3)
    kept = [step.density for step in result.steps[2:]]
    assert min(kept) <= result.report.density <= max(kept)


def test_text_and_decoding_are_timed(pipe, monkeypatch):
    for owner, name, seconds in ((pipe, "encode_prompt", 0.5), (pipe.vae, "decode", 1.0)):
        real = getattr(owner, name)

        def slowly(*args, real=real, seconds=seconds, **options):
            time.sleep(seconds)
            return real(*args, **options)

        monkeypatch.setattr(owner, name, slowly)
    result = generate(pipe, request())
    assert result.text_seconds >= 0.5
    assert result.decoding_seconds >= 1.0


def test_the_processors_are_put_back(pipe):
    before = pipe.transformer.attn_processors
    generate(pipe, request())
    after = pipe.transformer.attn_processors
    assert all(after[name] is before[name] for name in before)
    assert not pipe.transformer._forward_pre_hooks


def test_they_are_put_back_after_a_failure(pipe):
    before = pipe.transformer.attn_processors

    def fail(step):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generate(pipe, request(), fail)
    after = pipe.transformer.attn_processors
    assert all(after[name] is before[name] for name in before)
    assert not pipe.transformer._forward_pre_hooks


def test_dense_is_what_the_pipeline_gives(pipe):
    result = generate(pipe, request(sparse=None))
    stock = pipe(
        prompt="a red circle",
        height=64,
        width=64,
        num_frames=9,
        num_inference_steps=4,
        generator=torch.Generator().manual_seed(0),
        output_type="np",
    ).frames[0]
    np.testing.assert_array_equal(result.frames, (stock * 255).round().astype(np.uint8))
    assert result.report is None
    assert not any(step.sparse for step in result.steps)
    assert result.estimated_seconds_saved is None


def test_a_broken_video_is_an_error(pipe, monkeypatch):
    def decode(latents, return_dict):
        return (torch.full((1, 3, 9, 64, 64), torch.nan),)

    monkeypatch.setattr(pipe.vae, "decode", decode)
    message = r"decoded in float32, has non-finite values; .*check the model's files"
    with pytest.raises(RuntimeError, match=message):
        generate(pipe, request())


def test_latents_that_are_not_finite_stop_the_run_at_their_step(pipe, monkeypatch):
    forwards, forward = [], pipe.transformer.forward

    def break_the_second(*arguments, **keywords):
        forwards.append(1)
        (noise,) = forward(*arguments, **keywords)
        return (noise * torch.nan if len(forwards) == 2 else noise,)

    monkeypatch.setattr(pipe.transformer, "forward", break_the_second)
    message = "step 2 of 4 produced non-finite values, computed in float32; "
    with pytest.raises(RuntimeError, match=message):
        generate(pipe, request(sparse=None))
    assert len(forwards) == 2


@pytest.mark.parametrize(
    ("dtype", "remedy"),
    [
        (torch.float16, "load the model in bfloat16 or float32."),
        (torch.bfloat16, "load the model in float32."),
        (torch.float32, "check the model's files and the guidance scales."),
    ],
)
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_the_remedy_is_another_dtype_than_the_run_had(dtype, remedy, value):
    transformer = SimpleNamespace(dtype=dtype)
    pipe = SimpleNamespace(_execution_device=torch.device("cpu"), transformer=transformer)
    recorder = generation._StepRecorder(pipe, 4, None, None)
    recorder.step_ends(pipe, 0, None, {"latents": torch.zeros(2)})
    with pytest.raises(RuntimeError, match=r"step 2 of 4 .* in [a-z]+\d+; ") as caught:
        recorder.step_ends(pipe, 1, None, {"latents": torch.tensor([0.0, value])})
    assert str(caught.value).endswith(remedy)


def test_a_seed_gives_one_video_wherever_it_comes_in_a_run(pipe):
    first = generate(pipe, request(seed=1))
    other = generate(pipe, request(seed=2))
    again = generate(pipe, request(seed=1))
    np.testing.assert_array_equal(first.frames, again.frames)
    assert (first.frames != other.frames).any()


def test_videos_made_together_are_those_made_alone(pipe):
    """Prompts of unequal length, each with its own noise."""
    first = request(sparse=None, seed=3)
    second = replace(first, prompt="a red circle and a green square, moving left", seed=4)
    together = generate_together(pipe, [first, second])
    for result, alone in zip(
        together, (generate(pipe, first), generate(pipe, second)), strict=True
    ):
        assert result.latents.shape == alone.latents.shape
        torch.testing.assert_close(result.latents, alone.latents, rtol=1e-3, atol=1e-4)
        assert np.abs(result.frames.astype(int) - alone.frames).max() <= 1
    assert together[0].seconds == together[1].seconds


@pytest.fixture
def one_second_a_step(pipe, monkeypatch):
    """A clock, as a list of one number, that every forward of the transformer moves by one."""
    clock = [1000.0]
    monkeypatch.setattr(generation, "time", SimpleNamespace(perf_counter=lambda: clock[0]))

    def tick(module, args, output):
        clock[0] += 1

    hook = pipe.transformer.register_forward_hook(tick)
    yield clock
    hook.remove()


@pytest.mark.usefixtures("one_second_a_step")
def test_videos_made_together_share_the_seconds(pipe):
    requests = [GenerationRequest("a red circle", seed=seed, video=SMALL) for seed in (0, 1)]
    for result in generate_together(pipe, requests):
        assert result.seconds == SMALL.num_inference_steps / 2
        assert [step.seconds for step in result.steps] == [0.5] * SMALL.num_inference_steps


def test_showing_a_step_takes_no_time_of_the_next(pipe, one_second_a_step):
    def show(step):
        one_second_a_step[0] += 100

    result = generate(pipe, GenerationRequest("a red circle", video=SMALL), show)
    assert [step.seconds for step in result.steps] == [1.0] * SMALL.num_inference_steps


def test_videos_made_together_share_their_settings(pipe):
    with pytest.raises(ValueError, match="got different video, sparse; generate them one after"):
        generate_together(
            pipe, [request(), request(sparse=None, video=replace(SMALL, num_frames=5))]
        )
    with pytest.raises(ValueError, match="there is no request"):
        generate_together(pipe, [])


def test_true_guidance_needs_no_negative_prompt(pipe):
    guided = request(video=VideoSettings(64, 64, 9, 2, true_cfg_scale=4.0))
    result = generate(pipe, guided)
    assert len(result.report.forwards) == 4


def test_the_last_steps_can_be_dense(pipe):
    settings = SparseSettings(0.8, block_size=16, warmup_steps=1, cooldown_steps=2, min_tokens=0)
    result = generate(pipe, request(sparse=settings))
    assert [step.sparse for step in result.steps] == [False, True, False, False]


def test_a_schedule_is_followed(pipe):
    schedule = ThresholdSchedule.from_list([0.5, 1.0, 0.7])
    settings = SparseSettings(schedule, block_size=16, warmup_steps=0, min_tokens=0)
    result = generate(pipe, request(sparse=settings))
    assert [step.sparse for step in result.steps] == [True, False, True, True]
    assert count_steps(settings, Run(4, 2, 48, "cpu", 4)).dense == 1


def test_saved_seconds_come_from_the_medians():
    seconds = [9.0, 2.0, 2.0, 8.0, 1.0, 1.0]
    steps = tuple(StepRecord(i, 6, s, sparse=i >= 3, density=None) for i, s in enumerate(seconds))
    frames, latents = np.zeros((1, 2, 2, 3), np.uint8), torch.zeros(4, 1, 1, 1)
    result = GenerationResult(frames, steps, 25.0, None, None, latents)
    assert (result.seconds_per_dense_step, result.seconds_per_sparse_step) == (2.0, 1.0)
    assert result.estimated_seconds_saved == 3.0
    assert (result.dense_seconds, result.sparse_seconds) == (13.0, 10.0)


def test_refreshes_are_counted_apart(pipe):
    settings = SparseSettings(
        density=0.3, block_size=16, warmup_steps=1, min_tokens=0, refresh_every=2
    )
    result = generate(pipe, request(sparse=settings))
    assert [step.kind for step in result.steps] == ["refresh", "sparse", "refresh", "dense"]
    seconds = zip((10.0, 2.0, 12.0, 9.0), result.steps, strict=True)
    steps = tuple(replace(step, seconds=second) for second, step in seconds)
    result = replace(result, steps=steps)
    assert (result.seconds_per_sparse_step, result.seconds_per_refresh_step) == (2.0, 11.0)
    assert result.estimated_seconds_saved == (9 - 2) + 2 * (9 - 11)


def test_the_attention_backend_serves_the_dense_steps(tiny_pipeline, monkeypatch):
    from diffusers.models import attention_dispatch

    monkeypatch.setattr(
        attention_dispatch._AttentionBackendRegistry,
        "_active_backend",
        attention_dispatch._AttentionBackendRegistry._active_backend,
    )
    options = LoadOptions(str(tiny_pipeline), device="cpu", attention_backend="_native_math")
    pipe = load_pipeline(options)
    pipe.set_progress_bar_config(disable=True)
    used = []
    native_math = attention_dispatch.AttentionBackendName._NATIVE_MATH
    backends = attention_dispatch._AttentionBackendRegistry._backends
    original = backends[native_math]

    def spy(*arguments, **keywords):
        used.append(native_math)
        return original(*arguments, **keywords)

    monkeypatch.setitem(backends, native_math, spy)
    generate(pipe, request())
    assert len(used) == 2 * 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt": "\n"}, "the prompt is empty"),
        ({"prompt": "a", "seed": 2**63}, r"seed must lie between 0 .*; use 0"),
        (
            {"prompt": "a", "negative_prompt": "b"},
            "a negative prompt needs true_cfg_scale above 1",
        ),
    ],
)
def test_requests_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        GenerationRequest(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"height": 40}, "height must be a positive multiple of 16 pixels, got 40; use 32"),
        ({"width": -16}, "width must be a positive multiple of 16 pixels, got -16; use 16"),
        ({"num_frames": 0}, r"num_frames must be 4k \+ 1, .* got 0; use 1"),
        ({"num_frames": 128}, r"num_frames must be 4k \+ 1, .* got 128; use 129"),
        ({"num_inference_steps": 0}, "num_inference_steps must be at least 1, got 0; use 50"),
        ({"guidance_scale": float("nan")}, "guidance_scale must be a finite number.* use 6"),
        ({"true_cfg_scale": -1.0}, "true_cfg_scale must be a finite number .* -1; use 1"),
    ],
)
def test_video_settings_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        VideoSettings(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threshold": 0.0}, r"threshold must lie in \(0, 1\], got 0.0"),
        ({"threshold": float("nan")}, r"threshold must lie in \(0, 1\], got nan"),
        ({"stride": 0}, "stride must divide block_size"),
        ({"block_size": 0}, "block_size must be at least 1 token"),
        ({"cooldown_steps": -1}, "cooldown_steps must be at least 0, got -1; use 0"),
    ],
)
def test_sparse_settings_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        SparseSettings(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": torch.int8}, "dtype must be one of"),
        ({"device": "nowhere"}, "device must be cpu, cuda or cuda:N"),
        ({"device": "meta"}, "device must be cpu, cuda or cuda:N, got 'meta'; use one of these"),
        ({"device": "mps"}, "device must be cpu, cuda or cuda:N, got 'mps'"),
        ({"device": "cuda:99"}, "device 'cuda:99' does not exist"),
        ({"device": "cpu", "offload": "group"}, "offload='group' needs a GPU"),
        ({"offload": "disk"}, "offload must be one of none, model, sequential, group"),
    ],
)
def test_load_options_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        LoadOptions(**options)


@pytest.mark.usefixtures("pretend_cuda")
def test_defaults_follow_the_documented_advice():
    full = LoadOptions()
    assert (full.resolved_offload, full.resolved_vae_tiling) == ("model", True)
    assert full.resolved_dtype == torch.bfloat16
    demo = LoadOptions("demo")
    assert (demo.resolved_offload, demo.resolved_vae_tiling) == ("none", False)
    assert LoadOptions(device="cpu").resolved_dtype == torch.float32


@pytest.mark.usefixtures("pretend_cuda")
def test_on_cuda_the_parts_have_the_documented_dtypes(tiny_pipeline, monkeypatch):
    monkeypatch.setattr(loading, "_place", lambda pipe, options: None)
    pipe = load_pipeline(LoadOptions(str(tiny_pipeline), device="cuda"))
    assert pipe.transformer.dtype == torch.bfloat16
    for part in (pipe.vae, pipe.text_encoder, pipe.text_encoder_2):
        assert part.dtype == torch.float16
    assert pipe.vae.use_tiling


@pytest.mark.usefixtures("pretend_cuda")
@pytest.mark.parametrize(
    ("offload", "call"),
    [
        ("none", "to"),
        ("model", "enable_model_cpu_offload"),
        ("sequential", "enable_sequential_cpu_offload"),
        ("group", "enable_group_offload"),
    ],
)
def test_offloading_is_the_pipelines_own(offload, call):
    pipe = Mock()
    loading._place(pipe, LoadOptions(device="cuda", offload=offload))
    ((name, arguments, keywords),) = pipe.method_calls
    assert name == call
    assert torch.device("cuda") in [*arguments, *keywords.values()]
    # A Mock takes any argument; Diffusers does not.
    inspect.signature(getattr(HunyuanVideoPipeline, call)).bind(pipe, *arguments, **keywords)
