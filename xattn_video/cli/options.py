"""Options that several commands share, and what they add up to."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from xattn_video.pipelines.request import DEMO_SETTINGS, VideoSettings, default_settings
from xattn_video.pipelines.source import DEMO
from xattn_video.policy.schedule import ThresholdSchedule
from xattn_video.policy.settings import DEFAULT_THRESHOLD, SparseSettings

if TYPE_CHECKING:
    from xattn_video.ops.scoring import Precision
    from xattn_video.pipelines.loading import LoadOptions, Offload

_FULL = VideoSettings()


def option(panel: str, text: str, *names: str, **settings: Any) -> Any:
    """An option in a panel of the help."""
    return typer.Option(*names, help=text, rich_help_panel=panel, **settings)


def _video_option(text: str, name: str) -> Any:
    """An option whose default depends on the model."""
    full, demo = getattr(_FULL, name), getattr(DEMO_SETTINGS, name)
    default = f"{full:g}" if full == demo else f"{full:g}; demo {demo:g}"
    return option("Video", text, show_default=default)


_MODEL = "Model"
_SPARSITY = "Sparse attention"
_FILES = "Files"

Prompt = Annotated[str | None, typer.Option(help="What the video shows.")]
PromptsFile = Annotated[
    Path | None,
    typer.Option(help="Many prompts, one a line; a line that begins with # is a comment."),
]

Model = Annotated[
    str,
    option(
        _MODEL,
        "demo (ships with the package), a hub ID, or a folder.",
        # A help of 80 columns has no room for the whole ID.
        show_default="HunyuanVideo, from the hub",
    ),
]
Dtype = Annotated[
    str | None,
    option(
        _MODEL,
        "Of the transformer: bfloat16, float16 or float32.",
        show_default="bfloat16 where it is fast",
    ),
]
Device = Annotated[
    str | None,
    option(_MODEL, "cpu, cuda or cuda:N.", show_default="cuda if there is one"),
]
OffloadOption = Annotated[
    str | None,
    option(
        _MODEL,
        "What waits in host memory: none, model, sequential or group.",
        show_default="the fastest that fits",
    ),
]
VaeTiling = Annotated[
    bool | None,
    option(
        _MODEL,
        "Decode the video in tiles, which takes less memory.",
        show_default="on; demo off",
    ),
]
AttentionBackend = Annotated[
    str | None,
    option(_MODEL, "Diffusers' attention backend for the dense steps, such as native or flash."),
]

Force = Annotated[
    bool, option(_MODEL, "Run what seems not to fit in memory all the same.", "--force")
]

Height = Annotated[int | None, _video_option("Pixels, a multiple of 16.", "height")]
Width = Annotated[int | None, _video_option("Pixels, a multiple of 16.", "width")]
NumFrames = Annotated[int | None, _video_option("4k + 1 frames.", "num_frames")]
NumInferenceSteps = Annotated[int | None, _video_option("Denoising steps.", "num_inference_steps")]
GuidanceScale = Annotated[
    float | None, _video_option("Guidance that the model takes as an input.", "guidance_scale")
]
TrueCfgScale = Annotated[
    float | None, _video_option("Guidance by a second forward, above 1.", "true_cfg_scale")
]
NegativePrompt = Annotated[
    str | None, option("Video", "What it must not show; needs --true-cfg-scale above 1.")
]
Seed = Annotated[int, option("Video", "Of the initial noise, the same for every prompt.")]
Fps = Annotated[int, option("Video", "Frames per second of the file.")]

Threshold = Annotated[
    float | None,
    option(
        _SPARSITY,
        "Share of the estimated attention mass to keep, in (0, 1].",
        show_default="0.95",
    ),
]
Schedule = Annotated[Path | None, option(_SPARSITY, "JSON file with a threshold for each step.")]
Stride = Annotated[int, option(_SPARSITY, "Tokens between scored antidiagonals.")]
BlockSize = Annotated[int, option(_SPARSITY, "Tokens in a block.")]
WarmupSteps = Annotated[int, option(_SPARSITY, "First steps that stay dense.")]
CooldownSteps = Annotated[int, option(_SPARSITY, "Last steps that stay dense.")]
MinTokens = Annotated[
    int | None,
    option(
        _SPARSITY,
        "With fewer video tokens all steps stay dense.",
        show_default="16384 on CUDA, else 2048; demo 0",
    ),
]
ScoringPrecision = Annotated[
    str,
    option(_SPARSITY, "Of the estimate: exact, float8, or auto, the faster of them."),
]
Dense = Annotated[bool, option(_SPARSITY, "Dense attention throughout.", "--dense")]
Backend = Annotated[str, option(_SPARSITY, "One of those that `xattn-video backends` lists.")]

Output = Annotated[
    Path | None,
    option(
        _FILES,
        "The video, .mp4 or .mkv (lossless); a folder with --prompts-file.",
        show_default="named after the prompt; folder videos",
    ),
]
Report = Annotated[Path | None, option(_FILES, "JSON: settings, times and what ran.")]
Plot = Annotated[
    Path | None,
    option(_FILES, "PNG: density by step and layer; a folder with --prompts-file."),
]
Verbose = Annotated[
    bool, typer.Option("--verbose", help="Log choices; print the traceback of an error.")
]


def video_settings(
    model: str,
    height: int | None,
    width: int | None,
    num_frames: int | None,
    num_inference_steps: int | None,
    guidance_scale: float | None,
    true_cfg_scale: float | None,
) -> VideoSettings:
    """The model's settings with the options that were given.

    Raises:
        ValueError: A value is out of range.
    """
    options: dict[str, Any] = {
        "height": height,
        "width": width,
        "num_frames": num_frames,
        "num_inference_steps": num_inference_steps,
        "guidance_scale": guidance_scale,
        "true_cfg_scale": true_cfg_scale,
    }
    given = {name: value for name, value in options.items() if value is not None}
    return replace(default_settings(model), **given)


def chosen_min_tokens(model: str, min_tokens: int | None) -> int | None:
    """The option; if not given 0 for the demo, which is there to show sparse attention."""
    return 0 if min_tokens is None and model == DEMO else min_tokens


def sparse_settings(
    threshold: float | None,
    schedule: Path | None,
    dense: bool,
    *,
    scoring_precision: str = "auto",
    **settings: Any,
) -> SparseSettings | None:
    """The sparse settings that were asked for; None for dense attention throughout.

    Args:
        threshold, schedule, dense: Options of which one is given at the most.
        scoring_precision: As typed.
        settings: The other arguments of `SparseSettings`.

    Raises:
        ValueError: Options that exclude each other, no schedule in the file, or a value that is
            out of range.
    """
    tau = _choose_threshold(threshold, schedule, dense)
    # It checks what is given, which --dense leaves unused but does not make right.
    sparse = SparseSettings(
        DEFAULT_THRESHOLD if tau is None else tau,
        scoring_precision=cast("Precision", scoring_precision),
        **settings,
    )
    return None if tau is None else sparse


def _choose_threshold(
    threshold: float | None, schedule: Path | None, dense: bool
) -> float | ThresholdSchedule | None:
    """The threshold or the schedule; None for dense attention throughout.

    Raises:
        ValueError: Options that exclude each other, or no schedule in the file.
    """
    given = {"--threshold": threshold, "--schedule": schedule, "--dense": dense or None}
    names = [name for name, value in given.items() if value is not None]
    if len(names) > 1:
        raise ValueError(f"{' and '.join(names)} exclude each other; give one of them.")
    if dense:
        return None
    if schedule is None:
        return DEFAULT_THRESHOLD if threshold is None else threshold
    try:
        return ThresholdSchedule.load(schedule)
    except OSError as error:
        raise ValueError(
            f"cannot read the schedule {str(schedule)!r}: {error.strerror}."
        ) from None


def load_options(
    model: str,
    dtype: str | None,
    device: str | None,
    offload: str | None = None,
    vae_tiling: bool | None = None,
    attention_backend: str | None = None,
    *,
    device_elsewhere: bool = False,
    gpu_memory: float | None = None,
) -> "LoadOptions":
    """How to load the model.

    Raises:
        ValueError: A value that is not known.
    """
    from xattn_video.pipelines.loading import DTYPES, LoadOptions

    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}.")
    return LoadOptions(
        model,
        None if dtype is None else DTYPES[dtype],
        device,
        cast("Offload | None", offload),  # checked by LoadOptions
        vae_tiling,
        attention_backend,
        device_elsewhere,
        gpu_memory,
    )
