"""What the page and the README say of whole videos, from the reports of the command line."""

import json
import shlex

import pytest

from benchmarks.benchmark_page import render_page, render_readme_table
from benchmarks.whole_videos import MODEL, WholeVideo, memory_by_offload, read_whole_videos
from xattn_video.policy.presets import PRESETS


def video(stem, dense_steps=(), sparse_steps=(), seconds=100.0, offload="model", gib=35.0, **run):
    """A report as `--report` writes it, cut down to what is read; seconds of the steps given."""
    steps = [{"seconds": second, "sparse": False} for second in dense_steps]
    steps += [{"seconds": second, "sparse": True} for second in sparse_steps]
    report = {
        "density": 0.34 if sparse_steps else None,
        "backends": ["flash4"] if sparse_steps else [],
    }
    defaults = {
        "prompt": "a cat",
        "height": 720,
        "width": 1280,
        "num_frames": 129,
        "num_inference_steps": len(steps),
        "true_cfg_scale": 1.0,
        "sparse": {"threshold": 0.345, "warmup_steps": 5},
        "seconds": seconds,
        "dense_seconds": sum(dense_steps),
        "sparse_seconds": sum(sparse_steps),
        "peak_memory_gib": gib,
        "steps": steps,
        "report": report,
    }
    content = {"device": "A GPU", "offload": offload, "versions": {"torch": "2.11"}}
    return WholeVideo(stem, content | {"runs": [defaults | run]})


DENSE = video("d", dense_steps=[30, 20, 20, 20], seconds=120.0)
SPARSE = video("s", dense_steps=[30, 20], sparse_steps=[12, 9], seconds=80.0)


def test_a_sparse_video_is_compared_with_the_dense_one_like_it():
    others = [
        video("fewer steps", dense_steps=[30, 20], seconds=70.0),
        video("elsewhere", dense_steps=[30, 20, 20, 20], seconds=90.0, offload="none"),
        video("smaller", dense_steps=[30, 20, 20, 20], seconds=10.0, height=480),
    ]
    table = render_readme_table([], [*others, DENSE, SPARSE])
    rows = [line for line in table.splitlines() if "| A GPU |" in line]
    assert rows == [
        "| a whole video, 720x1280, 129 frames, 2 of 4 steps sparse | A GPU | 0.340 | 120 s "
        "| 80 s | 1.50x |  |",
    ]


def test_the_page_shows_what_each_took():
    page = render_page([], [DENSE, SPARSE])
    assert "## Whole videos, 720x1280, 129 frames" in page
    assert "| 4 dense, 0 sparse |  |  |  | model | 1 | 20.0 |  | 30 | 120 | 35.0 |" in page
    assert (
        "| 2 dense, 2 sparse |  | 0.340 | flash4 | model | 1 | 20.0 | 9.0 | 9 | 80 | 35.0 |"
        in page
    )
    assert "Whole videos" not in render_page([], [])


def test_a_single_step_is_no_measure_of_a_step():
    short = video("x", dense_steps=[30], sparse_steps=[12, 9])
    assert short.step_seconds(sparse=False) is None
    assert short.step_seconds(sparse=True) == 9


def test_memory_is_named_by_offloading():
    more = video("p", gib=70.0, sparse={"threshold": None} | PRESETS["fast"])
    nowhere = video("n", dense_steps=[1], gib=49.7, offload="none")
    videos = [SPARSE, nowhere, video("m", gib=34.0), more]
    assert memory_by_offload(videos) == (
        "Peak GPU memory of these videos without a preset: 49.7 GiB with `--offload none`, "
        "35.0 GiB with `--offload model`."
    )


def test_the_command_leaves_out_defaults():
    assert video("x", dense_steps=[1.0] * 50).command == (
        f"xattn-video generate --model {MODEL} --prompt 'a cat' --threshold 0.345 --report x.json"
    )
    sparse = {"threshold": 0.5, "warmup_steps": 1}
    words = shlex.split(video("x", dense_steps=[1.0], offload="group", sparse=sparse).command)
    preset = sparse | {"threshold": None} | PRESETS["fast"]
    assert "--preset fast --num" in video("x", dense_steps=[1.0], sparse=preset).command
    assert words[-8:] == [
        "--num-inference-steps",
        "1",
        "--warmup-steps",
        "1",
        "--offload",
        "group",
        "--report",
        "x.json",
    ]


def test_a_video_of_several_gpus_is_told_apart():
    content = DENSE.content | {"ranks_per_video": 2}
    both = WholeVideo("two", content)
    assert shlex.split(both.command)[:5] == [
        *("torchrun", "--nproc-per-node", "2", "-m", "xattn_video.cli")
    ]
    assert "| 2 | 20.0 |" in render_page([], [both])
    assert "1.50x" not in render_readme_table([], [both, SPARSE])
    assert memory_by_offload([SPARSE, both]) == memory_by_offload([SPARSE])


def test_only_videos_of_random_weights_are_read(tmp_path):
    for stem, seconds in (("demo-h100", 1), (f"{MODEL}-a", 2), (f"{MODEL}-b", 3)):
        content = video(stem, dense_steps=[1.0], seconds=seconds).content
        (tmp_path / f"{stem}.json").write_text(json.dumps(content))
    assert [found.stem for found in read_whole_videos(tmp_path)] == [f"{MODEL}-b", f"{MODEL}-a"]


@pytest.mark.parametrize("found", read_whole_videos(), ids=lambda video: video.stem)
def test_the_committed_reports_ran_what_they_say(found):
    assert found.run["report"]["num_refused"] == 0
    sparse = found.run["sparse"]
    if found.density is not None:
        # With refreshes the last step is dense too.
        last = sparse.get("refresh_every") is not None
        assert found.count(sparse=False) == sparse["warmup_steps"] + last
        assert found.run["report"]["num_sparse_layers"] == 60
    assert found.content["versions"]["torch"]
