"""The results of a comparison as a web page, made from results.json and the lossless videos."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from xattn_video.measure.clips import read_clip
from xattn_video.measure.comparison_page import comparison_rows
from xattn_video.measure.comparison_rows import MethodRow, comparison_table
from xattn_video.measure.methods import DENSE
from xattn_video.measure.page_players import compared_player
from xattn_video.measure.verdict import verdict
from xattn_video.reporting.web_page import Figure, HeatMap, Picture, Player, WebPage

Record: TypeAlias = Mapping[str, Any]

# Each takes a few hundred kB at 256x256 pixels and 65 frames.
MOST_PLAYERS = 8
# With at most so many rows, the table is turned: a narrow window has room for as many columns.
_FEW_ROWS = 3
_COMPRESSED = (
    "The videos on this page are compressed. PSNR and SSIM are computed from the raw "
    "frames, which the "
    ".mkv files in the folder videos hold without loss."
)


def comparison_web_page(record: Record, folder: Path, pictures: Sequence[Path]) -> WebPage:
    """A page with everything that a comparison found.

    Args:
        record: The content of results.json.
        folder: The folder of results.json and of the videos that it names.
        pictures: Plots to show if there are several sparse methods.
    """
    rows = comparison_rows(record)
    sparse = [row for row in rows if row.method.sparse is not None]
    pairs = list(_pairs(record, sparse))
    table = comparison_table(rows)
    video = record["video"]
    size = f"{video['width']}x{video['height']}, {video['num_frames']} frames"
    return WebPage(
        title="Dense and sparse attention from the same noise",
        lead=f"{record['model']}, {size}, {video['num_inference_steps']} steps, on "
        f"{record['device']} in {record['dtype']}. {_asked(record)}",
        figures=tuple(single_verdict(record).values()),
        players=tuple(_players(pairs[:MOST_PLAYERS], folder, len(sparse) > 1)),
        heat_maps=tuple(_heat_maps(record, sparse)),
        tables=(("Measured", table.turned() if len(rows) <= _FEW_ROWS else table),),
        facts=(("Settings", _settings(sparse)), ("What ran", _what_ran(record))),
        pictures=tuple(_plots(pictures)) if len(sparse) > 1 else (),
        notes=tuple(_notes(record, pairs)),
        command=record["command"],
    )


def single_verdict(record: Record) -> dict[str, Figure]:
    """The verdict on the only sparse method; empty if there are several."""
    sparse = [row for row in comparison_rows(record) if row.method.sparse is not None]
    return verdict(sparse[0], record) if len(sparse) == 1 else {}


def heat_map(
    title: str, densities: Sequence[Sequence[float | None]], settings: Mapping[str, Any]
) -> HeatMap:
    """A heat map of densities, `[layers][steps]`; the settings tell why a step is dense."""

    def cell(density: float | None, step: int, steps: int) -> float | str:
        if density is not None:
            return density
        if step < settings["warmup_steps"]:
            return "dense, warm-up"
        return "dense, cool-down" if step >= steps - settings["cooldown_steps"] else "dense"

    return HeatMap(
        title,
        [[cell(value, step, len(row)) for step, value in enumerate(row)] for row in densities],
    )


def settings_facts(settings: Mapping[str, Any]) -> dict[str, str]:
    """Sparse settings as labelled text, without those that are None."""
    return {
        name.replace("_", " "): "a schedule" if isinstance(value, dict) else f"{value}"
        for name, value in settings.items()
        if value is not None
    }


def _pairs(record: Record, sparse: Sequence[MethodRow]) -> Iterator[tuple[Record, Record, str]]:
    """Pairs of a dense and a sparse video from the same noise, with the label of the latter."""
    labels = {row.method.name: row.method.label for row in sparse}
    dense = {
        (video["prompt"], video["seed"]): video
        for video in record["videos"]
        if video["method"] == DENSE.name
    }
    found = [
        (dense[video["prompt"], video["seed"]], video, labels[video["method"]])
        for video in record["videos"]
        if video["method"] in labels and video["files"]
    ]
    # Sorted so that the settings of one prompt and seed are together.
    yield from sorted(found, key=lambda pair: record["videos"].index(pair[0]))


def _players(
    pairs: Sequence[tuple[Record, Record, str]], folder: Path, several: bool
) -> Iterator[Player]:
    for dense, sparse, label in pairs:
        clips = [read_clip(folder / video["files"][0]) for video in (dense, sparse)]
        title = f"{sparse['prompt']} (seed {sparse['seed']})"
        title += f", {label}" if several else ""
        yield compared_player(title, clips[0], label, clips[1])


def _heat_maps(record: Record, sparse: Sequence[MethodRow]) -> Iterator[HeatMap]:
    for row in sparse:
        densities = record["layer_densities"].get(row.method.name)
        if densities is not None and row.method.sparse is not None:
            yield heat_map(row.method.label, densities, row.method.sparse.to_dict())


def _asked(record: Record) -> str:
    """The prompt, or the number of prompts and the seeds."""
    prompts = list(dict.fromkeys(video["prompt"] for video in record["videos"]))
    if len(prompts) == 1:
        return f"Prompt: {prompts[0]}"
    seeds = record["seeds"]
    return f"{len(prompts)} prompts, seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}."


def _settings(sparse: Sequence[MethodRow]) -> dict[str, str]:
    """The settings that all sparse methods share."""
    found = [row.method.sparse.to_dict() for row in sparse if row.method.sparse is not None]
    shared = {
        name: value
        for name, value in (found[0] if found else {}).items()
        if all(other[name] == value for other in found)
    }
    return settings_facts(shared)


def _what_ran(record: Record) -> dict[str, str]:
    facts = {
        "device": f"{record['device']}, {record['dtype']}",
        "sparse backend": ", ".join(record["backends"]) or "none needed",
        "video tokens": f"{record['video_tokens']:,}",
        "offload": record["offload"],
        "videos in a call": str(record["batch_size"]),
    }
    return facts | {name.replace("_", "-"): text for name, text in record["versions"].items()}


def _plots(paths: Sequence[Path]) -> Iterator[Picture]:
    captions = {
        "psnr-density": "PSNR against density",
        "psnr-grid": "PSNR by threshold and warm-up steps",
    }
    for path in paths:
        for name, caption in captions.items():
            if path.stem.endswith(name):
                yield Picture(caption, path.read_bytes())


def _notes(record: Record, pairs: Sequence[object]) -> Iterator[str]:
    if pairs:
        yield _COMPRESSED
    if len(pairs) > MOST_PLAYERS:
        yield f"{MOST_PLAYERS} of {len(pairs)} pairs are shown; the folder videos contains all."
    for name, why in record["missing"].items():
        yield f"{name} is not measured: {why}"
