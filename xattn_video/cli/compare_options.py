"""The options that only `xattn-video compare` has, and what they mean together."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import typer

from xattn_video.cli.outputs import Prompts
from xattn_video.options.command import Group, given_options, group_of, knob, option
from xattn_video.options.groups import given_sparse, sparse_options
from xattn_video.pipelines.request import GenerationRequest, VideoSettings
from xattn_video.pipelines.source import DEMO
from xattn_video.policy.presets import parse_setting
from xattn_video.policy.schedule import read_schedule
from xattn_video.policy.settings import SparseSettings

if TYPE_CHECKING:
    from xattn_video.measure.methods import Method

_Number = TypeVar("_Number", int, float)

_GRID = "Compared settings"
_EXISTING = "Existing files"

# Field of `SparseSettings` -> the option that takes several values, and an example of them.
_SEVERAL = {
    "threshold": ("thresholds", "0.9,0.95"),
    "warmup_steps": ("warmup_steps", "0,5"),
    "stride": ("strides", "8,16"),
    "density": ("densities", "0.1,0.2"),
    "refresh_every": ("refresh_every", "0,5,10, where 0 means never"),
}
# The arguments that a comparison of two existing files uses.
_OF_FILES = (
    *("reference", "candidate", "output", "overwrite", "html", "open"),
    *("verbose", "quiet", "as_json"),
)


@dataclass(frozen=True, slots=True)
class ComparedPrompts(Prompts):
    """The prompts as given on the command line."""

    demo_prompts: int | None = knob(
        "With --model demo: number of its held-out prompts to use, from a fixed list."
    )


@dataclass(frozen=True, slots=True)
class ExistingFiles:
    """Two existing videos to compare."""

    reference: Path | None = knob(
        "Reference video to compare with; nothing is generated.", panel=_EXISTING, reads=True
    )
    candidate: Path | None = knob(
        "Video to compare, of the same size, length and frame rate.", panel=_EXISTING, reads=True
    )


@dataclass(frozen=True, slots=True)
class CompareDetails:
    """Other settings of what is generated, measured and written."""

    seeds: str = knob(
        "Seeds of the initial noise, such as 0,1; every prompt uses each seed.",
        "0",
        "--seeds",
        "--seed",
        panel=_GRID,
    )
    kept_mass: bool = knob(
        "Also measure the true softmax mass of the kept blocks, with one extra generation of the "
        "first batch for each setting.",
        True,
        panel=_GRID,
    )
    negative_prompt: str | None = knob(
        "What the video must not show; needs --true-cfg-scale above 1.", panel="Video"
    )
    fps: int = knob("Frames per second of the file.", 24, panel="Video")
    batch_size: int = knob("Videos generated in one call.", 1, panel="Video")
    force: bool = knob("Run even if the memory seems too small.", False, "--force", panel="Model")
    output: Path | None = knob(
        "Folder for the results.", panel="Files", shown_default="compare; existing files: none"
    )
    overwrite: bool = knob(
        "Discard the results in the folder and start over.", False, "--overwrite", panel="Files"
    )
    videos: bool = knob(
        "Write every video losslessly, and each sparse video next to its dense video. Without "
        "videos, VMAF is not measured and ffmpeg is not needed.",
        True,
        panel="Files",
    )


@dataclass(frozen=True, slots=True)
class _Further:
    setting: list[str] | None = knob(
        "An additional setting, such as preset=fast or density=0.2,refresh_every=5; may be given "
        "several times. density may be a file that `xattn-video calibrate` wrote, with a preset "
        "too. Without --thresholds and --densities only these are compared.",
        panel=_GRID,
    )
    schedule: Path | None = knob(
        "JSON file with a threshold for each step, or with what `xattn-video calibrate` found, "
        "compared in addition to --thresholds and --densities.",
        panel=_GRID,
        reads=True,
    )
    noise_ceiling: bool = knob(
        "Also compare two dense runs, to show how much identical runs differ.", True, panel=_GRID
    )


def compared_prompts(
    model: str, prompt: str | None, prompts_file: Path | None, demo_prompts: int | None
) -> list[str]:
    """The prompts from the option that was given.

    Raises:
        ValueError: Several options or none were given, or too many demo prompts are requested.
    """
    if demo_prompts is None:
        if prompt is None and prompts_file is None:
            raise ValueError("give --prompt, --prompts-file or --demo-prompts, got none.")
        return Prompts(prompt, prompts_file).read()
    if prompt is not None or prompts_file is not None:
        raise ValueError(
            "--demo-prompts cannot be combined with --prompt or --prompts-file; give only one."
        )
    if model != DEMO:
        raise ValueError(f"--demo-prompts needs --model {DEMO}, got {model!r}; give --prompt.")
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
        ValueError: A part of the list is not a number, or occurs twice.
    """
    try:
        numbers = [kind(part) for part in text.split(",")]
    except ValueError:
        what = "whole numbers" if kind is int else "numbers"
        raise ValueError(f"{name} must be {what} separated by commas, got {text!r}.") from None
    twice = next((number for number in numbers if numbers.count(number) > 1), None)
    if twice is not None:
        raise ValueError(
            f"{name} must be different numbers, got {twice:g} more than once in {text!r}; "
            "give each once."
        )
    return numbers


def refuse_unused(context: typer.Context) -> None:
    """Refuse options that a comparison of two existing files does not use.

    Raises:
        ValueError: Such an option was given.
    """
    unused = [name for parameter, name in given_options(context) if parameter not in _OF_FILES]
    if unused:
        raise ValueError(
            "--reference and --candidate compare existing files and generate nothing; "
            f"leave out {', '.join(unused)}, or the files."
        )


def _compared_methods(values: dict[str, Any]) -> "tuple[Method, ...]":
    """The methods to compare with dense attention.

    Raises:
        ValueError: A list holds something that is not a number, or a value is out of range.
    """
    from xattn_video.measure.methods import DENSE_AGAIN, method_of, sparse_methods, told_apart

    whole = ("warmup_steps", "stride", "refresh_every")
    grid: dict[str, list[Any]] = {
        knob_name: parse_numbers(
            values[name], int if knob_name in whole else float, f"--{name.replace('_', '-')}"
        )
        for knob_name, (name, _) in _SEVERAL.items()
        if values[name] is not None
    }
    if values["schedule"] is not None:
        schedule = read_schedule(values["schedule"])
        grid.setdefault(schedule.kind, []).append(schedule)
    several = {name for name, _ in _SEVERAL.values()}
    shared = given_sparse({name: values[name] for name in values if name not in several})
    whole_settings = values["setting"] or []
    methods = []
    if not whole_settings or "threshold" in grid or "density" in grid:
        methods = sparse_methods(grid, **shared)
    # A list of one value is not a grid; it applies to --setting as well.
    single = {
        name: numbers[0]
        for name, numbers in grid.items()
        if name in ("warmup_steps", "stride") and len(numbers) == 1
    }
    methods += [method_of(_whole(text, shared | single)) for text in whole_settings]
    methods = told_apart(methods)
    return (DENSE_AGAIN, *methods) if values["noise_ceiling"] else tuple(methods)


def _whole(text: str, others: dict[str, Any]) -> SparseSettings:
    """The settings of one --setting.

    Raises:
        ValueError: The text is not a valid setting.
    """
    try:
        return parse_setting(text, **others)
    except (TypeError, ValueError) as error:
        raise ValueError(f"--setting {text}: {error}") from None


def compared_requests(
    prompts: Sequence[str], seeds: str, negative_prompt: str | None, video: VideoSettings
) -> tuple[GenerationRequest, ...]:
    """Every prompt with every seed, dense.

    Raises:
        ValueError: The seeds are not a list of numbers, or a request is invalid.
    """
    numbers = parse_numbers(seeds, int, "--seeds")
    return tuple(
        GenerationRequest(prompt, negative_prompt, seed, video, sparse=None)
        for prompt in dict.fromkeys(prompts)
        for seed in numbers
    )


def _grid() -> Group:
    """The settings that are compared, made from the fields of `SparseSettings`."""
    options = {}
    for source in fields(SparseSettings):
        if source.name in _SEVERAL:
            name, example = _SEVERAL[source.name]
            text = f"{source.metadata['help'].rstrip('.')}; a list such as {example}."
            default = None if source.default is None else str(source.default)
            options[name] = option(
                source,
                name=name,
                names=_names(name, source.name),
                kind=str | None,
                default=default,
                help=text,
                panel=_GRID,
            )
    options |= group_of(_Further).options | sparse_options(without=tuple(_SEVERAL))
    return Group(options, _compared_methods)


def _names(*names: str) -> tuple[str, ...]:
    """The options with these names; the name that `generate` uses is accepted too."""
    return tuple(dict.fromkeys(f"--{name.replace('_', '-')}" for name in names))


GRID = _grid()
