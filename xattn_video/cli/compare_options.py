"""Options of `xattn-video compare` alone, and what they add up to."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from xattn_video.cli.options import option
from xattn_video.cli.outputs import choose_prompts
from xattn_video.pipelines.request import GenerationRequest, VideoSettings
from xattn_video.pipelines.source import DEMO

if TYPE_CHECKING:
    from xattn_video.measure.methods import Method

_Number = TypeVar("_Number", int, float)

_GRID = "Compared settings"
_EXISTING = "Existing files"
_FILES = "Files"

Thresholds = Annotated[str, option(_GRID, "Shares of attention mass to keep, such as 0.9,0.95.")]
WarmupSteps = Annotated[str, option(_GRID, "First steps that stay dense, such as 0,5.")]
Strides = Annotated[str, option(_GRID, "Tokens between scored antidiagonals, such as 8,16.")]
Seeds = Annotated[str, option(_GRID, "Of the initial noise, such as 0,1; each for every prompt.")]
NoiseCeiling = Annotated[
    bool, option(_GRID, "Also dense against dense: how far apart two equal runs are.")
]
KeptMass = Annotated[
    bool,
    option(
        _GRID,
        "Also the true softmax mass of the kept blocks, by one more generation of the first "
        "batch for each setting.",
    ),
]
DemoPrompts = Annotated[
    int | None,
    typer.Option(help="With --model demo: so many of its held-out prompts, a fixed list."),
]
BatchSize = Annotated[int, option("Video", "Videos generated in one call.")]
Reference = Annotated[
    Path | None, option(_EXISTING, "A video to compare another with; nothing is generated.")
]
Candidate = Annotated[
    Path | None, option(_EXISTING, "That other video, of the same size, length and frame rate.")
]
Output = Annotated[
    Path | None,
    option(_FILES, "Folder of the results.", show_default="compare; existing files: none"),
]
Videos = Annotated[
    bool,
    option(
        _FILES,
        "Write every video, lossless, and each sparse one beside the dense one. Without, VMAF is "
        "left out too, and no ffmpeg is needed.",
    ),
]


def compared_prompts(
    model: str, prompt: str | None, prompts_file: Path | None, demo_prompts: int | None
) -> list[str]:
    """The prompts of the one option that was given.

    Raises:
        ValueError: Several or none were given, or there are no such prompts.
    """
    if demo_prompts is None:
        if prompt is None and prompts_file is None:
            raise ValueError("give --prompt, --prompts-file or --demo-prompts, got none.")
        return choose_prompts(prompt, prompts_file)
    if prompt is not None or prompts_file is not None:
        raise ValueError("--demo-prompts excludes --prompt and --prompts-file; give one of them.")
    if model != DEMO:
        raise ValueError(f"--demo-prompts are for --model {DEMO}, got {model!r}; give --prompt.")
    if demo_prompts < 1:
        raise ValueError(f"--demo-prompts must be at least 1, got {demo_prompts}; use 40.")
    from xattn_video.pipelines.demo import held_out_scenes

    try:
        return [scene.prompt for scene in held_out_scenes(demo_prompts)]
    except ValueError as error:
        raise ValueError(f"--demo-prompts: {error}") from None


def parse_numbers(text: str, kind: Callable[[str], _Number], name: str) -> list[_Number]:
    """The numbers of a list such as "0.9,0.95".

    Raises:
        ValueError: One of them is none.
    """
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError:
        what = "whole numbers" if kind is int else "numbers"
        raise ValueError(f"{name} must be {what} with commas between, got {text!r}.") from None


def compared_methods(
    thresholds: str, warmup_steps: str, strides: str, noise_ceiling: bool, **shared: Any
) -> "tuple[Method, ...]":
    """What is compared with dense attention.

    Raises:
        ValueError: A list holds something else, or a value is out of range.
    """
    from xattn_video.measure.methods import DENSE_AGAIN, sparse_methods

    grid = sparse_methods(
        parse_numbers(thresholds, float, "--thresholds"),
        parse_numbers(warmup_steps, int, "--warmup-steps"),
        parse_numbers(strides, int, "--strides"),
        **shared,
    )
    return (DENSE_AGAIN, *grid) if noise_ceiling else tuple(grid)


def compared_requests(
    prompts: Sequence[str], seeds: str, negative_prompt: str | None, video: VideoSettings
) -> tuple[GenerationRequest, ...]:
    """Every prompt with every seed, dense.

    Raises:
        ValueError: The seeds are no list of numbers, or a request is not sound.
    """
    numbers = dict.fromkeys(parse_numbers(seeds, int, "--seeds"))
    return tuple(
        GenerationRequest(prompt, negative_prompt, seed, video, sparse=None)
        for prompt in dict.fromkeys(prompts)
        for seed in numbers
    )
