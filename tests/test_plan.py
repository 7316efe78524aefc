"""The dry run: what it says, and that it says it without weights."""

import io
import json
from dataclasses import replace

import pytest
import torch
from command_line import run_cli
from rich.console import Console

from xattn_video import ThresholdSchedule
from xattn_video.cli.plan import print_plan
from xattn_video.errors import UnsupportedModelError
from xattn_video.pipelines import run_plan as plan_module
from xattn_video.pipelines.loading import LoadOptions
from xattn_video.pipelines.memory import Room
from xattn_video.pipelines.model_shape import ModelShape, read_model_shape
from xattn_video.pipelines.request import VideoSettings
from xattn_video.pipelines.run_plan import plan_run
from xattn_video.pipelines.source import HUNYUAN_VIDEO, find_model
from xattn_video.policy.settings import SparseSettings

CPU = LoadOptions(device="cpu", dtype=torch.bfloat16)


def plan(video=None, sparse=None, load=CPU, shape=None, **settings):
    return plan_run(
        shape or ModelShape(),
        video or VideoSettings(),
        sparse or SparseSettings(**settings),
        load,
    )


def test_tokens_and_blocks_of_hunyuan_video():
    found = plan()
    assert found.grid == (33, 45, 80)
    assert (found.video_tokens, found.text_tokens) == (118_800, 256)
    assert (found.blocks, found.last_block_tokens) == (931, 16)
    assert (found.dense_steps, found.sparse_steps) == (5, 45)


def test_arithmetic_follows_from_the_layers():
    """Counted by hand for one layer, one block of tokens at a time."""
    found = plan()
    tokens, hidden, layers = 119_056, 3072, 60
    attention = layers * 4 * tokens**2 * hidden
    linear = layers * 2 * 12 * hidden**2 * tokens
    assert found.dense_step_tflop == pytest.approx((attention + linear) / 1e12)
    assert found.attention_share == pytest.approx(attention / (attention + linear))
    assert found.scoring_share == pytest.approx(found.attention_share / 16)


def test_parameters_agree_with_the_real_transformer():
    from diffusers import HunyuanVideoTransformer3DModel

    with torch.device("meta"):
        transformer = HunyuanVideoTransformer3DModel()
    real = sum(parameter.numel() for parameter in transformer.parameters())
    assert ModelShape().transformer_parameters == pytest.approx(real, rel=0.01)


def test_true_guidance_doubles_the_arithmetic():
    twice = plan(VideoSettings(true_cfg_scale=6.0))
    assert twice.forwards_per_step == 2
    assert twice.dense_step_tflop == pytest.approx(2 * plan().dense_step_tflop)


def test_bounds_are_amdahls():
    found = plan(warmup_steps=10)
    for bound in found.speedup_bounds:
        sparse = 1 - found.attention_share * (1 - bound.density) + found.scoring_share
        assert bound.step == pytest.approx(1 / sparse)
        assert bound.run == pytest.approx(50 / (10 + 40 * sparse))
    assert [b.density for b in found.speedup_bounds if b.from_paper] == [0.34, 0.455]


def test_dense_runs_have_no_sparse_step():
    found = plan_run(ModelShape(), VideoSettings(), None, CPU)
    assert (found.dense_steps, found.sparse_steps) == (50, 0)
    assert found.speedup_bounds == ()
    assert found.backend is None


def test_a_backend_without_compensation_is_warned_of():
    sparse = SparseSettings(compensation="means", backend="flex")
    found = plan_run(ModelShape(), VideoSettings(), sparse, CPU)
    assert found.backend is None
    assert any("which compensation needs" in warning for warning in found.warnings)


REFRESH = {"density": 0.1, "refresh_every": 5}


def test_refreshes_cost_steps_and_memory():
    plain, found = plan(density=0.1), plan(**REFRESH)
    assert (plain.refresh_steps, found.refresh_steps) == (0, 8)
    assert (plain.dense_steps, found.dense_steps) == (5, 6)
    # 8 bits for each of 128 numbers and 16 for their scale.
    gib = 119_056 * 24 * 130 * 60 / 2**30
    assert found.memory.residuals == pytest.approx(gib) == pytest.approx(20.8, abs=0.1)
    assert found.memory.peak == pytest.approx(plain.memory.peak + gib)
    twice = plan(VideoSettings(true_cfg_scale=6.0), **REFRESH)
    assert twice.memory.residuals == pytest.approx(2 * gib)
    assert [bound.density for bound in found.speedup_bounds][:2] == [0.1, 0.2]
    for bound in found.speedup_bounds:
        # By hand: 6 dense steps, one of which is sparse too, and 44 sparse ones, of which 8 are
        # dense too; these and the last warm-up step choose blocks.
        attentions = 6 + 8 + 45 * bound.density + 9 / 16
        other = 50 * (1 - found.attention_share)
        assert bound.run == pytest.approx(50 / (other + attentions * found.attention_share))


@pytest.mark.parametrize(
    ("residual", "gpu_gib", "on_host", "fits"),
    [
        ("host", 80, True, True),
        ("auto", 80, False, True),
        ("auto", 50, True, True),
        ("device", 50, False, False),
        ("device", 80, False, True),
    ],
)
def test_residuals_are_planned_where_there_is_room(residual, gpu_gib, on_host, fits):
    load = LoadOptions(
        device="cuda", offload="model", device_elsewhere=True, gpu_memory=float(gpu_gib)
    )
    plain = plan(load=load).memory
    found = plan(load=load, residual=residual, **REFRESH)
    gib = 119_056 * 24 * 130 * 60 / 2**30
    assert found.memory.residuals == pytest.approx(gib)
    assert found.memory.residuals_on_host == on_host
    assert found.memory.peak == pytest.approx(plain.peak + (0 if on_host else gib))
    assert found.memory.host == pytest.approx(plain.host + (gib if on_host else 0))
    if fits:
        assert found.shortage is None
    else:
        assert "refresh_every stores 21 GiB of residuals in device memory" in found.shortage
        assert found.shortage.endswith("offload='model' with residual='host' fits.")


@pytest.mark.parametrize(
    ("gpu", "host", "remedy"),
    [
        (60, 80, "offload='none' with residual='host' fits."),
        (60, 45, "offload='model' with residual='device' fits."),
        (33, 45, "Without refresh_every it fits, for example with density=0.2, "),
    ],
)
def test_no_room_for_residuals_says_what_would_fit(gpu, host, remedy, monkeypatch):
    monkeypatch.setattr(plan_module, "find_room", lambda _: Room(float(gpu), float(host)))
    load = LoadOptions(device="cuda", device_elsewhere=True)
    assert plan(load=load, density=0.1).shortage is None
    residual = "host" if host < 80 else "device"
    found = plan(load=load, residual=residual, **REFRESH)
    assert remedy in found.shortage
    if "offload=" in remedy:
        offload, place = remedy.split("'")[1:4:2]
        assert (
            plan(load=replace(load, offload=offload), residual=place, **REFRESH).shortage is None
        )


def test_the_residuals_are_shown():
    screen = io.StringIO()
    print_plan(plan(**REFRESH), Console(file=screen, width=250))
    assert "6 dense, 44 sparse (8 of them refresh), 60 layers" in screen.getvalue()
    assert ", residuals 20.8);" in screen.getvalue()


def test_refreshes_further_apart_than_there_are_steps_are_refused():
    with pytest.raises(ValueError, match="at most the number of denoising steps, got 51 and 50"):
        plan(refresh_every=51)


def test_a_schedule_of_ones_counts_as_dense():
    schedule = ThresholdSchedule.from_list([0.9] * 20 + [1.0])
    found = plan(threshold=schedule, warmup_steps=5, cooldown_steps=2)
    assert (found.dense_steps, found.sparse_steps) == (35, 15)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"warmup_steps": 50}, "No step is sparse: warmup_steps=50"),
        ({"threshold": 1.0}, "No step is sparse"),
        ({"cooldown_steps": 45}, "No step is sparse"),
    ],
)
def test_no_sparse_step_is_warned_of(settings, message):
    assert any(message in warning for warning in plan(**settings).warnings)


def test_small_videos_are_warned_of():
    small = VideoSettings(height=256, width=256, num_frames=17)
    found = plan(small, min_tokens=0)
    assert (found.blocks, found.last_block_tokens) == (12, 128)
    warnings = "\n".join(found.warnings)
    assert "The clip is only 1,280 tokens; sparse attention needs thousands." in warnings
    assert "Attention is 8% of a step's arithmetic" in warnings


def test_the_smallest_video_has_a_block():
    found = plan(VideoSettings(height=16, width=16, num_frames=1), min_tokens=0, block_size=512)
    assert (found.video_tokens, found.blocks, found.last_block_tokens) == (1, 1, 257)


def test_videos_that_stay_dense_for_their_size_are_warned_of():
    found = plan(VideoSettings(height=128, width=128, num_frames=17))
    assert found.sparse_steps == 0
    assert "320 video tokens are fewer than min_tokens=2,048" in found.warnings[0]
    assert plan(VideoSettings(height=128, width=128, num_frames=17), min_tokens=0).sparse_steps


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_cpu_that_is_fast_at_dense_attention_is_warned_of(dtype, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": True}, raising=False)
    video = VideoSettings(height=256, width=256, num_frames=33)
    found = plan(video, load=LoadOptions(device="cpu", dtype=dtype)).warnings
    assert any("fast in bfloat16 (AMX)" in text for text in found) == (dtype == torch.bfloat16)
    dense = plan_run(ModelShape(), video, None, LoadOptions(device="cpu", dtype=dtype))
    assert not any("AMX" in text for text in dense.warnings)


def test_large_videos_on_a_cpu_are_warned_of():
    assert any("603 PFLOP on device 'cpu' take 167.6 hours" in text for text in plan().warnings)


def test_a_laptop_plans_for_a_gpu_elsewhere(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(ValueError, match="device 'cuda' does not exist"):
        LoadOptions(device="cuda")
    found = plan(load=LoadOptions(device="cuda", device_elsewhere=True))
    assert (found.device, found.dtype, found.device_is_here) == ("cuda", "bfloat16", False)
    assert found.memory.peak == pytest.approx(36.0, abs=0.1)
    assert found.memory.offload == "model"
    assert found.backend is None
    assert found.warnings == ()


def test_a_backend_that_cannot_run_is_warned_of(monkeypatch):
    from xattn_video.backends import triton

    monkeypatch.setattr(triton, "unsupported_reasons", lambda problem: ["no GPU; get one."])
    found = plan(backend="triton")
    assert found.backend is None
    assert any("'triton' cannot run this problem" in warning for warning in found.warnings)


def test_the_slow_backend_on_a_gpu_is_warned_of(monkeypatch):
    reasons = {"triton": ["needs Triton 3.4; pip install triton"], "torch_gather": []}
    monkeypatch.setattr(plan_module, "available_backends", lambda device: reasons)
    warnings = plan_module._backend_warnings("torch_gather", torch.device("cuda"))
    assert "slow on a GPU" in warnings[0]
    assert "needs Triton 3.4; pip install triton" in warnings[0]


def test_ordinary_runs_have_no_warning(monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict, raising=False)
    video = VideoSettings(height=256, width=256, num_frames=65, num_inference_steps=25)
    shape = ModelShape(heads=2, double_layers=2, single_layers=5)
    assert plan(video, shape=shape).warnings == ()


def test_the_plan_is_plain_json():
    found = json.loads(json.dumps(plan().to_dict()))
    assert found["video_tokens"] == 118_800
    assert found["memory"]["peak"] > 0
    assert found["speedup_bounds"][1]["from_paper"] is True


def test_shapes_come_from_the_folder(tiny_pipeline):
    from diffusers import HunyuanVideoPipeline

    shape = read_model_shape(find_model(str(tiny_pipeline)))
    assert (shape.heads, shape.head_dim) == (2, 16)
    assert (shape.double_layers, shape.single_layers, shape.mlp_ratio) == (1, 2, 2.0)
    pipe = HunyuanVideoPipeline.from_pretrained(tiny_pipeline, local_files_only=True)
    assert shape.vae_parameters == pipe.vae.num_parameters()
    assert shape.text_parameters == sum(
        encoder.num_parameters() for encoder in (pipe.text_encoder, pipe.text_encoder_2)
    )


def test_hunyuan_video_itself_needs_no_file():
    assert read_model_shape(find_model(HUNYUAN_VIDEO)) == ModelShape()


def test_other_pipelines_are_refused(tmp_path):
    (tmp_path / "model_index.json").write_text('{"_class_name": "WanPipeline"}')
    with pytest.raises(
        UnsupportedModelError, match="is a WanPipeline, but the command line loads"
    ):
        read_model_shape(find_model(str(tmp_path)))


def test_a_scoring_precision_that_cannot_be_had_is_a_warning(monkeypatch):
    from xattn_video.ops import scoring

    monkeypatch.setattr(scoring, "triton_unsupported_reasons", lambda *_, **__: ["no 8 bits."])
    (warning,) = [w for w in plan(scoring_precision="float8").warnings if "float8" in w]
    assert warning.startswith('scoring precision "float8" is not available: no 8 bits.')


def test_gpus_that_share_a_video_are_planned_for():
    words = ["plan", "--model=demo", "--device=cpu", "--dtype=float32", "--height=512"]
    one, two = (
        json.loads(run_cli(*words, "--json", f"--num-gpus={number}")[1]) for number in (1, 2)
    )
    assert one["share"] == {"num_gpus": 1, "dense_step_speedup": 1.0, "sent_gib": 0.0}
    assert two["memory"]["activations"] == one["memory"]["activations"] / 2
    tokens, text, hidden, layers = two["video_tokens"], two["text_tokens"], 256, two["layers"]
    # Half of what each holds goes to the other: three tensors of the video, then the output.
    sent = (3 * tokens / 2 + tokens / 2 + text) / 2 * hidden * 4 * layers / 2**30
    assert two["share"]["sent_gib"] == pytest.approx(sent)
    assert 1.9 < two["share"]["dense_step_speedup"] < 2
    code, out, err = run_cli(*words, "--num-gpus=3")
    assert (code, out) == (2, "")
    assert "heads cannot be divided evenly among 3 GPUs" in err
