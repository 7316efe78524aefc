"""Tables of whole steps, for the page on fewer blocks."""

from collections.abc import Iterator, Mapping

from benchmarks.results_files import RESULTS, ResultRow, read_json, read_results, rows_of, sourced
from xattn_video.measure.methods import method_of
from xattn_video.policy.decision import Run, count_steps
from xattn_video.policy.presets import PRESETS, parse_setting, preset_settings
from xattn_video.policy.settings import SparseSettings
from xattn_video.reporting.tables import Table, figure

# Sizes of the whole video: 720x1280, 129 frames, 50 steps.
NUM_VIDEO_TOKENS, NUM_STEPS = 118_800, 50
PRESET_VIDEOS = RESULTS / "quality_fewer" / "fewer-blocks-512-h100.json"


def render_presets() -> str:
    """The table of presets: the demo model's PSNR, and the mean step of HunyuanVideo at 720p."""
    record = read_json(PRESET_VIDEOS)
    video = record["video"]
    steps = rows_of(read_results(RESULTS / "fewer_blocks"))
    seconds = {
        method_of(parse_setting(mean["setting"])).name: mean["latency_ms"] / 1e3
        for mean in _mean_steps(steps)
    }
    dense_s = next(row["latency_ms"] for row in steps if row["phase"] == "dense") / 1e3
    sparse = [row for row in record["rows"] if row["method"]["sparse"]]
    names = {method_of(preset_settings(name, min_tokens=0)).name: name for name in PRESETS}
    columns = {
        "setting": lambda row: names.get(row["method"]["name"], row["method"]["label"]),
        "PSNR": lambda row: f"{row['psnr']:.1f} dB",
        "SSIM": lambda row: f"{row['ssim']:.3f}",
        "computed blocks": lambda row: f"{row['density']:.0%}",
        "mean step": lambda row: figure(seconds.get(row["method"]["name"]), ".1f", " s"),
    }
    facts = (
        f"Demo model, {video['width']}x{video['height']}x{video['num_frames']}, "
        f"{video['num_inference_steps']} steps, {record['num_prompts']} prompts, compared with "
        f"dense attention from the same noise. The mean step is that of HunyuanVideo at "
        f"720x1280x129 on an H100, refreshes included; a dense step takes {dense_s:.1f} s:"
    )
    return f"{facts}\n\n{Table.of(sparse, columns).markdown()}\n"


def render_steps() -> str:
    """The table of each kind of step, and for each setting the mean of the steps after warm-up."""
    files = read_results(RESULTS / "fewer_blocks")
    rows = rows_of(files)
    means = [mean for file in files for mean in _mean_steps(file.content["rows"])]
    columns = {
        "setting": lambda row: row.get("setting") or row.get("threshold"),
        "step": lambda row: row["phase"],
        "density": lambda row: figure(row["density"], ".3f"),
        "seconds": lambda row: f"{row['latency_ms'] / 1e3:.2f}",
        "peak GiB": lambda row: f"{row['peak_memory_gib']:.1f}",
    }
    return sourced(Table.of(rows + means, columns, num_left=2), files)


def _mean_steps(rows: list[ResultRow]) -> Iterator[ResultRow]:
    """A row for each setting: the mean of a generation's steps after the warm-up."""
    dense_ms = next((row["latency_ms"] for row in rows if row["phase"] == "dense"), None)
    by_setting: dict[str, dict[str, ResultRow]] = {}
    for row in rows:
        if "setting" in row:
            by_setting.setdefault(row["setting"], {})[row["phase"]] = row
    for text, phases in by_setting.items():
        settings = parse_setting(text)
        ms = {phase: row["latency_ms"] for phase, row in phases.items()}
        if settings.refresh_every is not None and dense_ms is None:
            continue
        yield {
            **next(iter(phases.values())),
            "phase": f"mean of {NUM_STEPS - settings.warmup_steps}",
            "density": None,
            "latency_ms": mean_step_ms(settings, ms, dense_ms, NUM_STEPS),
            "peak_memory_gib": max(row["peak_memory_gib"] for row in phases.values()),
        }


def mean_step_ms(
    settings: SparseSettings, ms: Mapping[str, float], dense_ms: float | None, num_steps: int
) -> float:
    """The mean of a generation's steps after the warm-up, from one step of each phase.

    The additional time of the last warm-up step over a dense step is included.
    """
    counts = count_steps(settings, Run(60, 24, NUM_VIDEO_TOKENS, "cuda", num_steps))
    after = num_steps - settings.warmup_steps
    if settings.refresh_every is None:
        reused = counts.sparse - counts.choices
        return (counts.choices * ms["choose"] + reused * ms.get("reuse", 0.0)) / after
    assert dense_ms is not None
    between = counts.sparse - counts.refreshes
    total_ms = counts.refreshes * ms["refresh"] + between * ms["between"]
    total_ms += (counts.dense - settings.warmup_steps) * dense_ms
    total_ms += counts.primes * (ms["prime"] - dense_ms)
    return total_ms / after
