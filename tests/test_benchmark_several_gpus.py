"""Two GPUs beside one: what is paired, what is timed, and what the page says."""

import json
from dataclasses import replace

import torch
from launched import launch
from test_benchmark_whole_videos import video

from benchmarks import exchange, several_gpus
from benchmarks.launched_ranks import LaunchedRanks
from benchmarks.results_files import ResultFile
from benchmarks.whole_videos import WholeVideo


def shared(alone: WholeVideo, num_gpus: int = 2) -> WholeVideo:
    return replace(alone, content=alone.content | {"ranks_per_video": num_gpus})


ONE = video(
    "one", [30, 20], [12, 9], text_seconds=2.0, decoding_seconds=27.0, seconds=100.0, gib=50.0
)
TWO = shared(
    video("two", [16, 11], [7, 5], text_seconds=2.0, decoding_seconds=9.0, seconds=50.0, gib=45.0)
)


def test_only_videos_of_the_same_settings_are_paired():
    others = [
        shared(video("more steps", [16, 11, 11], [7, 5])),
        shared(video("offloaded", [16, 11], [7, 5], offload="group")),
        shared(video("denser", [16, 11], [7, 5], sparse={"threshold": 0.5, "warmup_steps": 5})),
        shared(ONE, 4),
    ]
    assert several_gpus.video_pairs([ONE, TWO, *others]) == [(ONE, TWO)]


def test_a_video_is_shown_part_by_part():
    table = several_gpus._videos([several_gpus.VideoPair(ONE, TWO)])
    assert "| the fastest dense step | 20.00 | 11.00 | 1.82x |" in table
    assert "| all sparse steps | 21.00 | 12.00 | 1.75x |" in table
    assert "| decoding | 27.00 | 9.00 | 3.00x |" in table
    assert "| whole video | 100.00 | 50.00 | 2.00x |" in table
    assert "45.0 GiB per GPU: `torchrun --nproc-per-node 2 -m xattn_video.cli generate" in table


def test_a_step_is_paired_with_that_of_its_threshold():
    rows = [
        {"name": "step", "phase": "sparse", "threshold": threshold, "density": threshold / 2}
        | {"gpus": gpus, "latency_ms": 1000 / gpus / threshold, "peak_memory_gib": 40.0}
        | {"exchange_ms": 1.0, "difference": 1e-3}
        for threshold in (0.2, 0.4)
        for gpus in (1, 2)
    ]
    head = {"gpu": "A GPU", "date": "today", "versions": {"torch": "2"}, "command": "c"}
    table = several_gpus._steps([ResultFile("a", head | {"rows": rows})])
    found = [line for line in table.splitlines() if line.startswith("| sparse")]
    assert [line.split(" | ")[1:6] for line in found] == [
        ["0.100", "2", "5.00", "2.50", "2.00x"],
        ["0.200", "2", "2.50", "1.25", "2.00x"],
    ]


def test_a_run_is_shown_with_what_it_printed():
    found = {"exit_code": 0, "seconds": 9.6, "error": None, "options": "--parallel cfg"}
    good = found | {"run": "shared", "ranks": 2, "frames": 65, "identical_frames": 64}
    error = "error: rank 1: " + "out of memory " * 20
    bad = found | {"run": "killed", "ranks": 2, "exit_code": 1, "options": "", "error": error}
    head = {"gpu": "A GPU", "date": "today", "versions": {"torch": "2"}, "command": "c"}
    table = several_gpus._runs([ResultFile("a", head | {"rows": [good, bad]})])
    assert "| shared | `--parallel cfg` | 2 | 0 | 10 | 64 of 65 |  |" in table
    assert "| killed |  | 2 | 1 | 10 |  | `error: rank 1: out of memory" in table
    assert max(map(len, table.splitlines())) < 200


def time_two_ranks() -> None:
    exchange.main(["--device=cpu", "--video-tokens=9", "--repeats=1", "--output=found.json"])


def test_the_parts_of_an_exchange_are_timed(tmp_path):
    first, second = launch([], 2, tmp_path, entry=time_two_ranks)
    assert (first.code, second.code, second.out) == (0, 0, ""), first.err
    content = json.loads((tmp_path / "found.json").read_text())
    assert [line.split("  ")[0] for line in first.out.splitlines()] == [
        row["part"] for row in content["rows"]
    ]
    assert all(row["latency_ms"] > 0 for row in content["rows"])
    assert several_gpus._layer_ms(ResultFile("a", content)) > 0


def test_calls_before_the_clock_starts_are_not_counted():
    calls = []
    alone = LaunchedRanks(0, 1, torch.device("cpu"))
    exchange.time_part(lambda: calls.append(1), alone, repeats=5)
    assert len(calls) == 8
