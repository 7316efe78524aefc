"""The benchmark of sparse attention beside a cache and 8-bit weights, and the recipes' tables."""

import json

import pytest
from diffusers import HunyuanVideoPipeline

from benchmarks import accelerations
from xattn_video.policy.report import ForwardRun, LayerRun, SparsityReport


def test_every_variant_is_measured_against_dense_bfloat16(tiny_pipeline, tmp_path, monkeypatch):
    monkeypatch.setattr(
        accelerations,
        "load_demo_pipeline",
        lambda dtype, device: HunyuanVideoPipeline.from_pretrained(tiny_pipeline, dtype=dtype),
    )
    monkeypatch.setattr(
        accelerations,
        "DEMO_SETTINGS",
        accelerations.VideoSettings(64, 64, num_frames=9, num_inference_steps=8),
    )
    output = tmp_path / "found.json"
    words = ["--num-prompts=2", "--cache-threshold=0.5", "--device=cpu", "--setting=threshold=1"]
    accelerations.main([*words, "--setting=threshold=0.9", "--output", str(output)])
    rows = json.loads(output.read_text())["rows"]
    found = [(row["setting"], row["cache_threshold"], row["casting"]) for row in rows]
    assert found == [
        ("threshold=1", None, False),
        ("threshold=0.9", None, False),
        ("threshold=1", 0.5, False),
        ("threshold=0.9", 0.5, False),
        ("threshold=1", None, True),
        ("threshold=0.9", None, True),
    ]
    dense, _, cached, _, cast, _ = rows
    assert (dense["psnr"], dense["ssim"]) == (100, 1)
    assert (dense["blocks"], dense["attention"]) == (1, 1)
    assert cached["blocks"] == cached["attention"] < 1
    assert cast["blocks"] == 1
    assert max(cached["ssim"], cast["ssim"]) < 1


def test_work_counts_skipped_layers_as_none_and_a_refresh_as_both():
    layers = (
        LayerRun("dense", "warm-up", None, 100),
        LayerRun("sparse", None, 20, 100),
        LayerRun("skipped"),
        LayerRun("sparse", None, 20, 100, refreshed=True),
    )
    report = SparsityReport(("a", "b", "c", "d"), (ForwardRun(0, 0, 1.0, None, None, layers),))
    found = accelerations.counted_work([report])
    assert found == {"blocks": 0.75, "attention": pytest.approx((1 + 0.2 + 0 + 1.2) / 4)}
