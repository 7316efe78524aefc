"""Tables for docs/multi_gpu.md: steps and videos on several GPUs, and a model for more GPUs."""

import itertools
from dataclasses import asdict
from textwrap import shorten
from typing import Any, NamedTuple

from benchmarks.results_files import RESULTS, ResultFile, ResultRow, read_results, rows_of, sourced
from benchmarks.whole_videos import WholeVideo
from xattn_video.measure.expected_seconds import ExpectedSeconds, MeasuredParts, VideoParts
from xattn_video.pipelines.loading import LoadOptions
from xattn_video.pipelines.model_shape import ModelShape
from xattn_video.pipelines.request import VideoSettings
from xattn_video.pipelines.run_plan import RunPlan, plan_run
from xattn_video.policy.settings import SparseSettings
from xattn_video.reporting.tables import Table, figure

STEPS, RUNS = RESULTS / "multi_gpu", RESULTS / "ranks"
# Numbers of GPUs in one machine that divide 24 heads.
_NUMBERS_OF_GPUS = (1, 2, 4, 8)


class VideoPair(NamedTuple):
    """The same video on one GPU and on two."""

    one: WholeVideo
    two: WholeVideo


def tables(videos: list[WholeVideo]) -> dict[str, str]:
    """{mark: table}."""
    files = read_results(STEPS)
    return {
        "steps": _steps(files),
        "exchange": _exchanges(files),
        "videos": _videos(video_pairs(videos)),
        "model": _model(MeasuredParts.of_record(parts_record(videos))),
        "runs": _runs(read_results(RUNS)),
    }


def video_pairs(videos: list[WholeVideo]) -> list[VideoPair]:
    """Pairs of sparse videos with the same settings on one GPU and on two."""
    return [
        VideoPair(one, two)
        for one, two in itertools.product(videos, videos)
        if (one.gpus, two.gpus) == (1, 2)
        and one.density is not None
        and (one.conditions, one.run["sparse"]) == (two.conditions, two.run["sparse"])
    ]


def parts_record(videos: list[WholeVideo]) -> dict[str, Any]:
    """The measured parts that ship with the package, which predicts times from them."""
    (pair,) = video_pairs(videos)
    (file,) = (file for file in read_results(STEPS) if file.kind == "exchange")
    plan = _plan(2)
    return {
        "device": pair.one.content["device"],
        "video": f"HunyuanVideo, {pair.one.frames}",
        "video_tokens": plan.video_tokens,
        "dense_step_tflop": plan.dense_step_tflop,
        "attention_share": plan.attention_share,
        "density": pair.one.density,
        "one": asdict(_parts(pair.one)),
        "two": asdict(_parts(pair.two)),
        "exchange": _layer_ms(file) / 1e3 * plan.layers,
        "sent_gib": plan.share.sent_gib,
        "sources": [
            *(f"benchmarks/results/generate/{video.stem}.json" for video in pair),
            f"benchmarks/results/multi_gpu/{file.stem}.json",
        ],
    }


def _parts(video: WholeVideo) -> VideoParts:
    dense, sparse = (video.step_seconds(sparse=kind) for kind in (False, True))
    assert dense is not None
    assert sparse is not None
    return VideoParts(video.run["text_seconds"], dense, sparse, video.run["decoding_seconds"])


def _plan(num_gpus: int) -> RunPlan:
    """The plan of a video with the default settings."""
    load = LoadOptions(device="cuda", offload="none", device_elsewhere=True, num_gpus=num_gpus)
    return plan_run(ModelShape(), VideoSettings(), SparseSettings(), load)


def _layer_ms(file: ResultFile) -> float:
    """Milliseconds of a layer's exchanges with an order of heads, as in every sparse step."""
    ms = {row["part"]: row["latency_ms"] for row in file.content["rows"]}
    return float(ms["to heads, dealt out"] + ms["to tokens, dealt out"])


def _steps(files: list[ResultFile]) -> str:
    """The table of each kind of step on one GPU and on several."""
    files = [file for file in files if file.kind == "step"]
    rows = [
        many | {"one": one}
        for file in files
        for one, many in itertools.permutations(file.content["rows"], 2)
        if one["gpus"] == 1 < many["gpus"] and _kind(one) == _kind(many)
    ]
    columns = {
        "step": lambda row: row["phase"],
        "density": lambda row: figure(row["density"], ".3f"),
        "GPUs": lambda row: row["gpus"],
        "one GPU, s": lambda row: f"{row['one']['latency_ms'] / 1e3:.2f}",
        "several GPUs, s": lambda row: f"{row['latency_ms'] / 1e3:.2f}",
        "speed-up": lambda row: f"{row['one']['latency_ms'] / row['latency_ms']:.2f}x",
        "exchanges": lambda row: f"{row['exchange_ms'] / row['latency_ms']:.1%}",
        "peak GiB, one GPU": lambda row: f"{row['one']['peak_memory_gib']:.1f}",
        "peak GiB per GPU": lambda row: f"{row['peak_memory_gib']:.1f}",
        "difference": lambda row: f"{row['difference']:.1e}",
    }
    return sourced(Table.of(rows, columns), files)


def _kind(row: ResultRow) -> tuple[str, float | None]:
    """What a step computes, on any number of GPUs."""
    return row["phase"], row.get("threshold")


def _exchanges(files: list[ResultFile]) -> str:
    """The table of the exchanges' times, for a layer and for a step."""
    files = [file for file in files if file.kind == "exchange"]
    num_layers = ModelShape().layers
    columns = {
        "part of an exchange": lambda row: row["part"],
        "ms": lambda row: f"{row['latency_ms']:.2f}",
        "s per step": lambda row: f"{row['latency_ms'] * num_layers / 1e3:.3f}",
    }
    return sourced(Table.of(rows_of(files), columns), files)


def _runs(files: list[ResultFile]) -> str:
    """The table of runs of the demo model, including those that were made to fail."""
    columns = {
        "run": lambda row: row["run"],
        "options": lambda row: row["options"] and f"`{row['options']}`",
        "ranks": lambda row: row["ranks"],
        "exit code": lambda row: row["exit_code"],
        "seconds": lambda row: f"{row['seconds']:.0f}",
        "frames identical to one GPU": _identical,
        "printed": lambda row: (
            row["error"] and f"`{shorten(row['error'], 130, placeholder=' ...')}`"
        ),
    }
    return sourced(Table.of(rows_of(files), columns, num_left=2), files)


def _identical(row: ResultRow) -> str:
    return f"{row['identical_frames']} of {row['frames']}" if "frames" in row else ""


def _videos(pairs: list[VideoPair]) -> str:
    """The table of each video on one GPU and on two, part by part."""
    rows = []
    for pair, (part, seconds) in itertools.product(pairs, _PARTS.items()):
        one, two = seconds(pair.one), seconds(pair.two)
        rows.append((part, f"{one:.2f}", f"{two:.2f}", f"{one / two:.2f}x"))
    headings = ("part", "one GPU, s", "two GPUs, s", "speed-up")
    lines = [Table(headings, tuple(rows)).markdown(), ""]
    for video in itertools.chain.from_iterable(pairs):
        lines.append(
            f"- {video.content['device']}, {video.packages}, density {video.density:.3f}, "
            f"{video.run['peak_memory_gib']:.1f} GiB per GPU: `{video.command}`"
        )
    return "\n".join(lines) + "\n"


_PARTS = {
    "text": lambda video: video.run["text_seconds"],
    "all dense steps": lambda video: video.run["dense_seconds"],
    "the fastest dense step": lambda video: video.step_seconds(sparse=False),
    "all sparse steps": lambda video: video.run["sparse_seconds"],
    "the fastest sparse step": lambda video: video.step_seconds(sparse=True),
    "decoding": lambda video: video.run["decoding_seconds"],
    "whole video": lambda video: video.run["seconds"],
}


def _model(parts: MeasuredParts) -> str:
    """The table of predicted times on more GPUs, and what they are derived from."""
    plans = [_plan(count) for count in _NUMBERS_OF_GPUS]
    expected = [ExpectedSeconds(parts, plan) for plan in plans]
    alone = expected[0].total(parts.density)
    columns = {
        "GPUs": lambda row: row.plan.share.num_gpus,
        "source": lambda row: "measured parts" if row.plan.share.num_gpus <= 2 else "model",
        "dense step, s": lambda row: f"{row.parts(parts.density).dense_step:.2f}",
        "sparse step, s": lambda row: f"{row.parts(parts.density).sparse_step:.2f}",
        "exchanges, s": lambda row: f"{row.traded:.2f}",
        "text, s": lambda row: f"{row.parts(parts.density).text:.1f}",
        "decoding, s": lambda row: f"{row.parts(parts.density).decoding:.1f}",
        "video, s": lambda row: f"{row.total(parts.density):.0f}",
        "speed-up": lambda row: f"{alone / row.total(parts.density):.2f}x",
        "GiB sent per step": lambda row: f"{row.plan.share.sent_gib:.1f}",
        "GiB per GPU (estimate)": lambda row: f"{row.plan.memory.peak:.1f}",
    }
    plan = plans[0]
    facts = (
        f"{parts.video}, {plan.steps} steps ({plan.sparse_steps} sparse), density "
        f"{parts.density:.3f}, {parts.device}:"
    )
    rate = parts.sent_gib * 2**30 / 1e9 / parts.exchange
    source = (
        f"With two GPUs, each sent {parts.sent_gib:.1f} GiB in the {parts.exchange:.2f} s of a "
        f"step's exchanges: {rate:.0f} GB/s, copies included."
    )
    return f"{facts}\n\n{Table.of(expected, columns).markdown()}\n\n{source}\n"
