"""`xattn-video demo`: the page, the videos, and the truth at its end."""

import json
import re
import sys
import webbrowser
from dataclasses import replace

import pytest
from command_line import run_cli

from xattn_video.cli.demo import DEMO_VIDEO, demo
from xattn_video.measure.comparison_rows import MethodRow
from xattn_video.measure.verdict import FullSize, verdict
from xattn_video.pipelines.request import VideoSettings

TINY = VideoSettings(height=64, width=64, num_frames=9, num_inference_steps=4)
SPARSE = ["--block-size=16", "--warmup-steps=2", "--threshold=0.6", "--device=cpu"]


@pytest.fixture
def opened(tmp_path, monkeypatch):
    """The pages that a browser was asked to show."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys.modules["xattn_video.cli.demo"], "DEMO_VIDEO", TINY)
    addresses: list[str] = []
    monkeypatch.setattr(webbrowser, "open", lambda address: not addresses.append(address))
    return addresses


def test_it_makes_a_page_and_videos_and_ends_with_the_truth(opened, tmp_path):
    code, out, err = run_cli("demo", "--open", *SPARSE)
    assert code == 0, err
    page = tmp_path / "xattn-demo/results.html"
    assert opened == [page.as_uri()]
    text = page.read_text()
    for shown in (
        "difference, 4 times as bright",
        "PSNR by frame: mean",
        "Step 3, layer 6: density",
    ):
        assert shown in text
    assert "Step 1, layer 6: dense, warm-up" in text
    assert len(list(tmp_path.glob("xattn-demo/videos/*/*.mkv"))) == 2
    record = json.loads((tmp_path / "xattn-demo/results.json").read_text())
    assert record["model"] == "demo"
    assert [row["method"]["name"] for row in record["rows"]] == ["dense", "tau0.6-warmup2-stride8"]
    psnr = record["rows"][1]["psnr"]
    assert re.search(rf"^picture +{psnr:.1f} dB PSNR against dense; SSIM 0\.\d+; ", out, re.M)
    assert re.search(r"^speed here +\d\.\d\dx speed of a sparse step on this machine; ", out, re.M)
    assert re.search(
        r"^full size +1\.\d\dx speed measured at full size; HunyuanVideo, ", out, re.M
    )
    assert re.search(r"^page +xattn-demo/results\.html$", out, re.M)

    # The same command shows the same page, and makes nothing again.
    code, again, err = run_cli("demo", *SPARSE)
    assert code == 0
    assert again == out
    assert "1 of 1 prompts and seeds are already done" in err
    assert len(opened) == 1


def test_other_settings_do_not_overwrite_it(opened, no_model, tmp_path):
    (tmp_path / "xattn-demo").mkdir()
    (tmp_path / "xattn-demo/results.json").write_text("{}")
    code, _, err = run_cli("demo")
    assert code == 2
    assert "already holds results.json" in err


def test_it_is_a_minute_of_work():
    pixels = DEMO_VIDEO.height * DEMO_VIDEO.width * DEMO_VIDEO.num_frames
    assert pixels * DEMO_VIDEO.num_inference_steps <= 256 * 256 * 33 * 25
    assert "in about a minute" in (demo.__doc__ or "")


def row_and_record(psnr=44.0, dense=1.0, sparse=0.5, device="cpu", tokens=2304, identical=False):
    """Of one sparse method."""
    values = dict.fromkeys(MethodRow.__dataclass_fields__)
    values |= {"num_videos": 1, "identical": identical, "psnr": psnr, "ssim": 0.99}
    values |= {"density": 0.7, "seconds": 1.0}
    values["method"] = {"name": "sparse", "label": "tau", "sparse": {"threshold": 0.9}}
    videos = [
        {"method": "dense", "dense_step_seconds": dense, "sparse_step_seconds": None},
        {"method": "sparse", "dense_step_seconds": dense, "sparse_step_seconds": sparse},
    ]
    record = {"device": device, "dtype": "float32", "video_tokens": tokens, "videos": videos}
    return MethodRow.from_dict(values), record


@pytest.mark.parametrize(
    ("psnr", "words"),
    [(44.0, "hard to see"), (35.0, "small differences"), (25.0, "the difference shows")],
)
def test_the_verdict_says_how_near_the_picture_is(psnr, words):
    figure = verdict(*row_and_record(psnr=psnr))["picture"]
    assert figure.value == f"{psnr:.1f} dB"
    assert words in figure.note


def test_the_verdict_on_equal_videos():
    assert verdict(*row_and_record(identical=True))["picture"].value == "identical"


@pytest.mark.parametrize(
    ("sparse", "value", "words"),
    [
        (0.5, "2.00x", "sparse is faster here"),
        (1.0, "1.00x", "no gain here"),
        (1.25, "0.80x", "sparse is slower here"),
    ],
)
def test_the_verdict_says_what_it_gained_here_and_on_what(sparse, value, words):
    figure = verdict(*row_and_record(sparse=sparse))["speed here"]
    assert figure.value == value
    assert f"a sparse step takes {sparse:.2f} s with 70% of the blocks" in figure.note
    assert "(cpu, float32)" in figure.note
    assert words in figure.note


def test_without_steps_of_both_kinds_nothing_is_said_of_speed():
    row, record = row_and_record()
    assert "speed here" not in verdict(row, record | {"videos": record["videos"][:1]})


def test_a_run_at_full_size_needs_no_other():
    assert "full size" in verdict(*row_and_record())
    assert "full size" not in verdict(*row_and_record(device="NVIDIA H100", tokens=119_056))


def test_full_size_is_what_the_committed_results_say():
    from benchmarks.whole_videos import full_size_record, read_whole_videos

    committed = FullSize.read()
    record = full_size_record(read_whole_videos())
    assert committed == FullSize.of_record(record)
    faster = replace(committed, sparse_seconds=committed.dense_seconds / 2)
    assert faster.figure.value == "2.00x"
