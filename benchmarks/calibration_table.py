"""The table of calibrated densities, for the page on fewer blocks.

A file of `benchmarks/results/calibration` has two parts: "calibration", the output of
`xattn-video calibrate --json`, and "comparison", the `results.json` of a comparison with and
without these densities.
"""

from typing import Any

from benchmarks.results_files import RESULTS, read_reports
from xattn_video.measure.methods import Method
from xattn_video.policy.schedule import ThresholdSchedule
from xattn_video.reporting.machine import describe_versions
from xattn_video.reporting.tables import Table

FOLDER = RESULTS / "calibration"


def render() -> str:
    """A table for each file, with its source."""
    return "\n".join(map(section, read_reports(FOLDER).values()))


def section(record: dict[str, Any]) -> str:
    """The table of one file: every sparse setting against uniform densities."""
    calibration, comparison = record["calibration"], record["comparison"]
    video = comparison["video"]
    rows = [row for row in comparison["rows"] if row["method"]["sparse"]]
    (uniform,) = (row for row in rows if not _is_calibrated(row))
    columns = {
        "densities": lambda row: "by layer and head" if _is_calibrated(row) else "uniform",
        "PSNR dB": lambda row: f"{row['psnr']:.2f}",
        "SSIM": lambda row: f"{row['ssim']:.4f}",
        "latent error": lambda row: f"{row['latent_error']:.4f}",
        "budget": lambda row: f"{row['density']:.3f}",
        "videos better": lambda row: None if row is uniform else _better(comparison, row, uniform),
    }
    versions = describe_versions(comparison["versions"])
    facts = (
        f"{comparison['model']} model, {video['width']}x{video['height']}x{video['num_frames']}, "
        f"{video['num_inference_steps']} steps, {comparison['num_prompts']} prompts, on "
        f"{comparison['device']}. The densities come from {len(calibration['prompts'])} other "
        f"prompts, whose mean error of attention outputs they lower from "
        f"{calibration['uniform_error']:.3g} to {calibration['calibrated_error']:.3g}:"
    )
    commands = "\n".join(one["command"] for one in (calibration, comparison))
    table = Table.of(rows, columns).markdown()
    return f"{facts}\n\n{table}\n\n- {versions}\n\n```bash\n{commands}\n```\n"


def _is_calibrated(row: dict[str, Any]) -> bool:
    sparse = Method.from_dict(row["method"]).sparse
    return sparse is not None and isinstance(sparse.density, ThresholdSchedule)


def _better(comparison: dict[str, Any], row: dict[str, Any], other: dict[str, Any]) -> str:
    """How many videos have a higher PSNR than with another setting, as text."""
    ours, theirs = (_psnr(comparison, one["method"]["name"]) for one in (row, other))
    return f"{sum(ours[video] > theirs[video] for video in theirs)} of {len(theirs)}"


def _psnr(comparison: dict[str, Any], method: str) -> dict[tuple[str, int], float]:
    return {
        (video["prompt"], video["seed"]): video["similarity"]["psnr"]
        for video in comparison["videos"]
        if video["method"] == method
    }
