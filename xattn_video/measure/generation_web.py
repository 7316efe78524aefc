"""Generated videos as a web page, made from the report of the command and the video files."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

from xattn_video.measure.clips import read_clip
from xattn_video.measure.comparison_web import MOST_PLAYERS, settings_facts
from xattn_video.measure.page_players import single_player
from xattn_video.reporting.web_page import HeatMap, WebPage


def generation_web_page(record: Mapping[str, Any], command: str) -> WebPage:
    """A page of the videos, what attention did in each, and their costs.

    Args:
        record: The report that `generate --report` writes.
        command: The command that made the videos.
    """
    runs = record["runs"]
    shown = runs[:MOST_PLAYERS]
    first = runs[0]
    attention = "dense" if first["sparse"] is None else "block-sparse"
    return WebPage(
        title=first["prompt"] if len(runs) == 1 else f"{len(runs)} videos",
        lead=f"{record['model']} with {attention} attention: {first['width']}x{first['height']}, "
        f"{first['num_frames']} frames, {first['num_inference_steps']} steps, on "
        f"{record['device']} in {record['dtype']}.",
        players=tuple(
            single_player(_title(run), Path(run["file"]).name, read_clip(Path(run["file"])))
            for run in shown
        ),
        heat_maps=tuple(
            HeatMap(_title(run), _cells(run["report"]["forwards"]))
            for run in shown
            if run["report"] is not None and run["report"]["forwards"]
        ),
        facts=(
            ("What ran", _what_ran(first)),
            ("Settings", settings_facts(first["sparse"] or {"attention": "dense"})),
            ("Made with", _made_with(record)),
        ),
        notes=tuple(_notes(len(runs))),
        command=command,
    )


def _title(run: Mapping[str, Any]) -> str:
    return f"{run['prompt']} (seed {run['seed']})"


def _cells(forwards: list[dict[str, Any]]) -> list[list[float | str]]:
    """`[layers][steps]`: the density of a step's passes, or why it ran dense."""
    steps: dict[int, list[dict[str, Any]]] = {}
    for forward in forwards:
        steps.setdefault(forward["step"], []).append(forward)
    layers = range(len(forwards[0]["states"]))
    return [[_cell(passes, layer) for _, passes in sorted(steps.items())] for layer in layers]


def _cell(passes: list[dict[str, Any]], layer: int) -> float | str:
    """The cell of one layer in one step."""
    densities = [forward["densities"][layer] for forward in passes]
    measured = [density for density in densities if density is not None]
    if measured:
        # A plain mean, because the passes of a step have equally many valid blocks.
        return fmean(measured)
    reason = passes[0]["reasons"][layer]
    return f"{passes[0]['states'][layer]}{(reason and f', {reason}') or ''}"


def _what_ran(run: Mapping[str, Any]) -> dict[str, str]:
    facts = {
        "attention": "dense throughout" if run["report"] is None else run["report"]["summary"],
        "whole video": f"{run['seconds']:.1f} s",
    }
    for kind in ("dense", "sparse"):
        seconds = run[f"seconds_per_{kind}_step"]
        if seconds is not None:
            facts[f"a {kind} step"] = f"{seconds:.2f} s"
    if run["peak_memory_gib"] is not None:
        facts["memory"] = f"{run['peak_memory_gib']:.2f} GiB at the peak"
    if run["report"] is not None:
        facts["sparse backend"] = ", ".join(run["report"]["backends"]) or "none needed"
    return facts


def _made_with(record: Mapping[str, Any]) -> dict[str, str]:
    facts = {"device": f"{record['device']}, {record['dtype']}", "offload": record["offload"]}
    return facts | {name.replace("_", "-"): text for name, text in record["versions"].items()}


def _notes(count: int) -> Iterator[str]:
    yield (
        "The videos on this page are compressed; the files written "
        "by the command have higher quality."
    )
    if count > 1:
        yield "The settings and the attention report are those of the first video."
    if count > MOST_PLAYERS:
        yield f"{MOST_PLAYERS} of {count} videos are shown."
