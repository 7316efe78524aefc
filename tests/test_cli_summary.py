"""The lines at the end of a generation."""

import io

import numpy as np
import pytest
import torch
from rich.console import Console

from xattn_video.cli.summary import print_summary
from xattn_video.pipelines.generation import GenerationResult, StepRecord
from xattn_video.pipelines.loading import LoadOptions
from xattn_video.pipelines.request import GenerationRequest, VideoSettings
from xattn_video.policy.settings import SparseSettings

GPU = LoadOptions(device="cuda", device_elsewhere=True)


def summary_of(dense, sparse, seconds=100.0, refresh=(), load=GPU) -> str:
    """What is printed for steps of the given seconds."""
    times = [(s, "dense") for s in dense] + [(s, "refresh") for s in refresh]
    times += [(s, "sparse") for s in sparse]
    steps = tuple(
        StepRecord(i, len(times), second, kind != "dense", None, kind == "refresh")
        for i, (second, kind) in enumerate(times)
    )
    frames, latents = np.zeros((1, 2, 2, 3), np.uint8), torch.zeros(4, 1, 1, 1)
    result = GenerationResult(frames, steps, seconds, 12.345, None, latents, text_seconds=1.5)
    video = VideoSettings(256, 256, 65, len(times))
    request = GenerationRequest("a red circle", None, 7, video, SparseSettings())
    console = Console(file=io.StringIO(), width=200)
    print_summary(console, request, result, {"video": "a.mp4"}, load)
    return console.file.getvalue()


def test_it_names_file_size_time_and_memory():
    lines = summary_of(dense=[9, 2, 2], sparse=[1, 1]).splitlines()
    assert lines[0] == "video      a.mp4"
    assert lines[1] == "size       256x256, 65 frames, seed 7"
    time = (
        "100.0 s, 3 dense steps of 2.00 s, 2 sparse steps of 1.00 s, 1.5 s for text encoding, "
        "83.5 s for decoding"
    )
    assert f"time       {time}" in lines
    assert lines[-1] == "memory     12.35 GiB at the peak"


def test_refresh_steps_have_a_time_of_their_own():
    text = summary_of(dense=[3, 3], sparse=[1, 1, 1], refresh=[4])
    assert "3 sparse steps of 1.00 s, 1 refresh step of 4.00 s," in text
    assert "saved      about 5.0 s compared with dense steps" in text


def test_it_says_what_was_saved():
    text = summary_of(dense=[3, 3], sparse=[1, 1, 1])
    assert "saved      about 6.0 s compared with dense steps throughout (estimate)\n" in text
    assert "lost" not in text


def test_a_loss_says_what_would_pay():
    text = summary_of(dense=[1, 1], sparse=[1.5, 1.5])
    wanted = "lost       about 1.0 s compared with dense steps throughout (estimate)"
    assert f"{wanted}; longer videos and lower thresholds gain more" in text
    assert "saved" not in text


@pytest.mark.parametrize(
    ("has_amx", "dtype", "pays"),
    [
        (True, torch.bfloat16, "dense attention is fast on this CPU in bfloat16 (AMX)"),
        (True, torch.float32, "on a CPU in float32, longer videos and lower thresholds gain more"),
        (
            False,
            torch.bfloat16,
            "on a CPU in bfloat16, longer videos and lower thresholds gain more",
        ),
    ],
)
def test_a_loss_on_a_cpu_knows_the_dtype(has_amx, dtype, pays, monkeypatch):
    found = {"amx_bf16": has_amx}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: found, raising=False)
    load = LoadOptions(device="cpu", dtype=dtype)
    assert f"(estimate); {pays}" in summary_of(dense=[1, 1], sparse=[1.5, 1.5], load=load)


@pytest.mark.parametrize(
    ("dense", "sparse"),
    [([1, 1], []), ([], [1, 1]), ([9], [1, 1]), ([1, 1], [1.01]), ([1, 1], [0.99])],
)
def test_without_both_kinds_of_warm_steps_or_a_difference_there_is_no_estimate(dense, sparse):
    text = summary_of(dense, sparse)
    assert "saved" not in text
    assert "lost" not in text
