"""The memory that a run is foretold to take, what is chosen by it and what is refused for it."""

from types import SimpleNamespace

import psutil
import pytest
import torch
from command_line import SMALL, run_cli

from benchmarks.whole_videos import read_whole_videos
from xattn_video.pipelines import memory as memory_module
from xattn_video.pipelines.loading import LoadOptions
from xattn_video.pipelines.memory import (
    Room,
    describe_shortage,
    estimate_memory,
    find_room,
    settle_offload,
)
from xattn_video.pipelines.model_shape import ModelShape, read_model_shape
from xattn_video.pipelines.request import DEMO_SETTINGS, VideoSettings
from xattn_video.pipelines.run_plan import plan_run
from xattn_video.pipelines.source import find_model
from xattn_video.policy.settings import SparseSettings

CPU = LoadOptions(device="cpu", dtype=torch.bfloat16)
NO_LIMIT = Room(None, None)
DEMO_PROMPT = "--prompt=a red circle moving left to right over a blue background"


def gpu(**options) -> LoadOptions:
    return LoadOptions(device="cuda", device_elsewhere=True, **options)


def estimate(load=CPU, video=None, room=NO_LIMIT, shape=None):
    return estimate_memory(shape or ModelShape(), video or VideoSettings(), load, room)


@pytest.fixture
def host(monkeypatch):
    """Set the GiB that are free on this machine."""

    def have(gib: float) -> None:
        memory = SimpleNamespace(available=gib * 2**30)
        monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)

    return have


@pytest.fixture
def gpu_here(monkeypatch, host):
    """A CUDA device of so many free GiB, beside a host of so many."""

    def have(gpu_gib: float, host_gib: float) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (gpu_gib * 2**30, 0))
        host(host_gib)

    return have


def test_memory_holds_the_weights():
    memory = estimate()
    assert memory.transformer == pytest.approx(12.8e9 * 2 / 2**30, rel=0.01)
    assert memory.peak == pytest.approx(
        memory.transformer + memory.text_encoders + memory.vae + memory.activations
    )
    # 36.3 GiB were measured on an H100: the weights and the activations of the transformer.
    assert memory.transformer + memory.activations == pytest.approx(36.3, rel=0.02)


def test_a_cpu_has_nowhere_to_offload_to():
    memory = estimate()
    assert (memory.offload, memory.peaks) == ("none", {"none": memory.peak})
    assert memory.host > memory.peak


@pytest.mark.parametrize("video", read_whole_videos(), ids=lambda video: video.stem)
def test_the_peaks_are_near_those_measured(video):
    sparse = SparseSettings(**video.run["sparse"])
    offload, peak = video.content["offload"], video.run["peak_memory_gib"]
    memory = plan_run(ModelShape(), VideoSettings(), sparse, gpu(offload=offload)).memory
    assert memory.peak == memory.peaks[offload]
    if video.gpus == 1:
        assert memory.peak == pytest.approx(peak, rel=0.05)
    else:
        assert peak < memory.peak


def test_group_offload_pins_a_second_copy_of_the_weights():
    """78 GiB of host memory were measured at HunyuanVideo's size."""
    memory = estimate(gpu(offload="group"))
    assert memory.host == pytest.approx(78, rel=0.05)
    assert memory.hosts["model"] < 45


def test_decoding_without_tiles_dominates_where_the_transformer_is_small():
    """Measured on a CPU for the demo's VAE in float32: 1.07 and 1.93 GiB."""
    shape = read_model_shape(find_model("demo"))
    load = LoadOptions("demo", torch.float32, "cpu")
    for side, measured in ((384, 1.07), (512, 1.93)):
        video = VideoSettings(side, side, 65)
        assert estimate(load, video, shape=shape).decoding == pytest.approx(measured, rel=0.3)
    whole = estimate(gpu(vae_tiling=False, offload="none"))
    assert whole.decoding > whole.activations
    assert whole.peak > 90
    assert estimate(gpu(vae_tiling=True)).decoding < 3


@pytest.mark.parametrize(
    ("room", "offload"),
    [
        (Room(79, 200), "none"),
        (Room(79, None), "none"),
        (Room(47, 200), "model"),
        (Room(24, 200), "group"),
        (Room(24, 64), "sequential"),
        (Room(8, 16), "sequential"),
    ],
)
def test_the_fastest_offload_that_fits_is_chosen(room, offload):
    memory = estimate(gpu(), room=room)
    assert memory.offload == offload
    assert (memory.peak, memory.host) == (memory.peaks[offload], memory.hosts[offload])
    fits = memory.fits(offload, room)
    assert memory.offload_reason.startswith(
        "the fastest that fits" if fits else "although nothing fits"
    )


def test_an_offload_that_was_asked_for_is_kept():
    memory = estimate(gpu(offload="group"), room=Room(79, 200))
    assert (memory.offload, memory.offload_reason) == ("group", "as requested")


def test_without_a_known_gpu_the_default_stands():
    memory = estimate(gpu())
    assert memory.offload == "model"
    assert "--gpu-memory" in memory.offload_reason


def test_offload_is_settled_by_what_is_free_here(gpu_here):
    video = VideoSettings()
    gpu_here(79, 200)
    assert settle_offload(LoadOptions(), video).offload == "none"
    assert settle_offload(LoadOptions(offload="model"), video).offload == "model"
    gpu_here(24, 200)
    assert settle_offload(LoadOptions(), video).offload == "group"
    assert settle_offload(LoadOptions("demo"), DEMO_SETTINGS).offload == "none"
    assert settle_offload(LoadOptions(device="cpu"), video).offload is None


def test_a_container_has_the_memory_of_its_limit(monkeypatch, tmp_path, host):
    host(64)
    limit = tmp_path / "memory.max"
    monkeypatch.setattr(memory_module, "_CGROUP_LIMIT", limit)
    assert find_room(CPU).host == 64
    limit.write_text("max\n")
    assert find_room(CPU).host == 64
    limit.write_text(f"{8 * 2**30}\n")
    assert find_room(CPU).host == 8


@pytest.mark.parametrize(
    ("total", "remedy"),
    [
        (40, "Try --offload model or group or sequential, or a smaller video."),
        (24, "Try --offload group or sequential, or a smaller video."),
        (8, "1280x720 with --num-frames 77 and --offload group fits."),
    ],
)
def test_the_remedy_names_what_fits(total, remedy):
    load, room = gpu(offload="none"), Room(total, None)
    found = describe_shortage(ModelShape(), VideoSettings(), load, room)
    assert found == f"About 51 GiB are needed and the GPU has {total}. {remedy}"


def test_the_video_that_the_remedy_names_does_fit():
    load, room = gpu(offload="sequential"), Room(8, None)
    for frames, fits in ((77, True), (81, False)):
        video = VideoSettings(num_frames=frames)
        assert (describe_shortage(ModelShape(), video, load, room) is None) == fits


def test_tiled_decoding_is_a_remedy():
    load = gpu(vae_tiling=False, offload="sequential")
    found = describe_shortage(ModelShape(), VideoSettings(), load, Room(24, None))
    assert found is not None
    assert found.endswith("Try --vae-tiling, or a smaller video.")


def test_host_memory_counts_beside_a_gpu():
    load = gpu(offload="group")
    found = describe_shortage(ModelShape(), VideoSettings(), load, Room(79, 64))
    assert found is not None
    assert found.startswith("About 80 GiB of host memory are needed and this machine has 64 free.")
    assert "Try --offload none or model or sequential" in found


def test_a_plan_warns_of_what_it_would_refuse(host):
    host(24)
    plan = plan_run(ModelShape(), VideoSettings(), None, CPU)
    assert plan.shortage is not None
    assert plan.shortage in plan.warnings
    assert "No video fits. Use a smaller --model" in plan.shortage
    host(80)
    assert plan_run(ModelShape(), VideoSettings(), None, CPU).shortage is None


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize(
    ("words", "fitting"),
    [
        ([], "No video fits. Use a smaller --model, such as demo, or another machine."),
        (["--model=demo", "--height=8192", "--width=8192"], "8192x8192 with --num-frames 1 fits."),
        (["--model=demo", "--num-frames=100001"], "256x256 with --num-frames "),
    ],
    ids=["HunyuanVideo", "large", "long"],
)
@pytest.mark.parametrize("command", ["generate", "compare"])
def test_what_cannot_fit_is_refused_before_the_hub_is_asked(
    command, words, fitting, host, tmp_path, monkeypatch
):
    import huggingface_hub

    def no_hub(*_: object) -> None:
        raise AssertionError("the hub was asked")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", no_hub)
    monkeypatch.chdir(tmp_path)
    host(22)
    output = "a.mp4" if command == "generate" else "results"
    code, _, err = run_cli(command, DEMO_PROMPT, "--device=cpu", *words, f"--output={output}")
    assert code == 2, err
    assert "GiB of host memory are needed and this machine has 22 free. " in err
    assert fitting in err
    assert err.endswith("--force runs it anyway.\n")
    assert err.count("\n") == 1


def test_force_tries_all_the_same(generate, host):
    host(0.5)
    code, _, err = generate("--prompt=a", "--output=a.mp4")
    assert code == 2
    assert "--force" in err
    code, _, err = generate("--prompt=a", "--output=a.mp4", "--force")
    assert code == 0, err
    assert "warning: About 1 GiB of host memory are needed" in err


def test_plan_plans_for_a_gpu_of_any_size():
    code, out, err = run_cli("plan", "--gpu-memory=24")
    assert (code, err) == (0, "")
    assert "offload    group, the fastest that fits 24 GiB of GPU memory; with none 50.6" in out
    assert "host about 80.1 GiB" in out
    assert "cuda, bfloat16, not on this machine" in out or torch.cuda.is_available()
    code, out, err = run_cli("plan", "--gpu-memory=2", "--offload=none")
    assert code == 0
    assert "are needed and the GPU has 2. " in err


@pytest.mark.parametrize("words", [["--gpu-memory=0"], ["--gpu-memory=24", "--device=cpu"]])
def test_a_gpu_without_memory_is_refused(words):
    code, _, err = run_cli("plan", *words)
    assert code == 2
    assert "--gpu-memory must be above 0 GiB on a CUDA device" in err


def test_small_runs_are_let_through(tiny_pipeline):
    code, _, err = run_cli("plan", "--model", tiny_pipeline, *SMALL)
    assert code == 0
    assert "GiB" not in err
