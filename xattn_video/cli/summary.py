"""The summary that is printed after a generation."""

from typing import TYPE_CHECKING

from rich.console import Console

from xattn_video.reporting.console import print_labelled

if TYPE_CHECKING:
    from xattn_video.pipelines.generation import GenerationResult
    from xattn_video.pipelines.loading import LoadOptions
    from xattn_video.pipelines.request import GenerationRequest
    from xattn_video.policy.settings import SparseSettings


def print_summary(
    console: Console,
    request: "GenerationRequest",
    result: "GenerationResult",
    files: dict[str, str],
    load: "LoadOptions",
) -> None:
    """Print the result and its costs, one labelled line each.

    Args:
        console: The console to print to.
        request: The request of the video.
        result: The result of the request.
        files: The written files, by kind.
        load: How the model was loaded: device and dtype.
    """
    from xattn_video.pipelines.cpu_speed import what_pays

    video = request.video
    size = f"{video.width}x{video.height}, {video.num_frames} frames, seed {request.seed}"
    lines = {"size": size, "attention": _attention(result)}
    if result.report is not None:
        lines["backend"] = ", ".join(result.report.backends) or "none needed"
        if result.report.imbalance is not None:
            lines["ranks"] = f"the busiest rank computes {result.report.imbalance:.2f}x the mean"
    lines["time"] = _time(result)
    saved = result.estimated_seconds_saved
    if saved is not None and abs(saved) >= 0.05:
        estimate = f"about {abs(saved):.1f} s compared with dense steps throughout (estimate)"
        if saved >= 0:
            lines["saved"] = estimate
        else:
            pays = what_pays(load.resolved_device, load.resolved_dtype)
            lines["lost"] = f"{estimate}; {pays}"
    if result.peak_memory_gib is not None:
        lines["memory"] = f"{result.peak_memory_gib:.2f} GiB at the peak"
    print_labelled(console, files | lines)


def print_outlook(console: Console, sparse: "SparseSettings") -> None:
    """Print what a run of the demo model cannot show."""
    from xattn_video.measure.verdict import full_size_figure

    lines = {
        "picture": "`xattn-video demo --open` compares a sparse video with a dense one",
        "full size": full_size_figure(sparse).line,
    }
    print_labelled(console, lines)


def _attention(result: "GenerationResult") -> str:
    if result.report is None:
        return f"dense in all {len(result.steps)} steps"
    return result.report.summary()


def _time(result: "GenerationResult") -> str:
    """Seconds: the total, a step of each kind, and everything except denoising."""
    parts = [f"{result.seconds:.1f} s"]
    kinds = (
        ("dense", result.seconds_per_dense_step),
        ("sparse", result.seconds_per_sparse_step),
        ("refresh", result.seconds_per_refresh_step),
    )
    for kind, seconds in kinds:
        if seconds is not None:
            count = sum(step.kind == kind for step in result.steps)
            noun = "step" if count == 1 else "steps"
            parts.append(f"{count} {kind} {noun} of {seconds:.2f} s")
    parts.append(f"{result.text_seconds:.1f} s for text encoding")
    parts.append(f"{result.decoding_seconds:.1f} s for decoding")
    return ", ".join(parts)
