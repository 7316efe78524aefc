"""Tables of docs/recipes, from the result files of `benchmarks.accelerations` and others."""

from collections.abc import Callable
from typing import Any

from benchmarks.results_files import RESULTS, ResultRow, read_results, rows_of, sourced
from benchmarks.whole_videos import WholeVideo
from xattn_video.measure.methods import method_of
from xattn_video.policy.presets import parse_setting
from xattn_video.reporting.tables import Table, figure

ACCELERATIONS = RESULTS / "accelerations"
_SAVED: dict[str, Callable[[ResultRow], str]] = {
    "transformer blocks run": lambda row: f"{row['blocks']:.0%}",
    "attention blocks computed": lambda row: f"{row['attention']:.0%}",
}
_PICTURE: dict[str, Callable[[ResultRow], str]] = {
    "PSNR": lambda row: _decibels(row, "psnr"),
    "worst PSNR": lambda row: _decibels(row, "worst_psnr"),
    "SSIM": lambda row: f"{row['ssim']:.4f}",
}


def tables(videos: list[WholeVideo]) -> dict[str, dict[str, str]]:
    """{page: {mark: table}}."""
    return {
        "docs/recipes/first_block_cache.md": {"caches": caches()},
        "docs/recipes/fp8.md": {"casting": casting()},
        "docs/recipes/small_cards.md": {"offloads": offloads(videos)},
    }


def caches() -> str:
    """The table of each cache threshold with each setting."""
    columns = {
        "cache": lambda row: figure(row["cache_threshold"], "g") or "none",
        "attention": _setting,
    }
    rows = [row for row in rows_of(read_results(ACCELERATIONS)) if not row["casting"]]
    return _videos_section(rows, columns | _SAVED | _PICTURE)


def casting() -> str:
    """The table of each setting with weights in 16 and in 8 bits."""
    columns = {
        "attention": _setting,
        "weights": lambda row: "float8_e4m3fn" if row["casting"] else "bfloat16",
    }
    rows = [row for row in rows_of(read_results(ACCELERATIONS)) if row["cache_threshold"] is None]
    settings = [row["setting"] for row in rows]
    rows.sort(key=lambda row: settings.index(row["setting"]))
    return _videos_section(rows, columns | _PICTURE)


def offloads(videos: list[WholeVideo]) -> str:
    """Peak GPU memory and seconds of a sparse step for each offload, without refreshes."""
    sparse = (video for video in videos if video.gpus == 1 and video.density is not None)
    plain = [video for video in sparse if not video.run["sparse"].get("refresh_every")]
    # Of several runs, the one with the most steps; these come first.
    rows = list({video.content["offload"]: video for video in reversed(plain)}.values())
    columns = {
        "`--offload`": lambda video: f"`{video.content['offload']}`",
        "GPU memory": lambda video: f"{video.run['peak_memory_gib']:.1f} GiB",
        "sparse step": lambda video: f"{video.step_seconds(sparse=True):.1f} s",
    }
    rows.sort(key=lambda video: video.run["peak_memory_gib"])
    return Table.of(rows, columns).markdown() + "\n"


def _videos_section(rows: list[ResultRow], columns: dict[str, Callable[[ResultRow], Any]]) -> str:
    """A line about the videos, and the table."""
    row = rows[0]
    facts = (
        f"Demo model, {row['width']}x{row['height']}x{row['num_frames']}, "
        f"{row['num_inference_steps']} steps, {row['num_prompts']} prompts, compared "
        "with dense attention in bfloat16 without a cache, from the same noise:"
    )
    table = Table.of(rows, columns, num_left=2)
    return f"{facts}\n\n{sourced(table, read_results(ACCELERATIONS))}"


def _setting(row: ResultRow) -> str:
    settings = parse_setting(row["setting"])
    if settings.threshold == 1:
        return "dense"
    name, _, value = row["setting"].partition("=")
    return value if name == "preset" else method_of(settings).label


def _decibels(row: ResultRow, column: str) -> str:
    """The PSNR as text; empty for the reference itself."""
    return f"{row[column]:.1f} dB" if row["ssim"] < 1 else "identical"
