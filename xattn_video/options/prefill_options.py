"""Options of `xattn-video prefill`: the prompt, and when attention is sparse."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any
from unicodedata import decimal

from xattn_video.language.prefill_settings import (
    DEFAULT_PREFILL_THRESHOLD,
    MIN_TOKENS_CPU,
    PREFILL_FIELDS,
    PrefillSettings,
    points_of_steps,
)
from xattn_video.options.command import Group, knob, option
from xattn_video.options.groups import SPARSITY, check_one_way
from xattn_video.policy.schedule import ThresholdSchedule, read_schedule
from xattn_video.policy.settings import MIN_TOKENS_CUDA, SparseSettings

DEFAULT_TOKENS = 131072
DEFAULT_NEEDLE = "blue lanterns by the river"
# The demo model was trained to find numbers of seven digits.
DEMO_NEEDLE = "4816235"
# Metadata that differs from that of video.
_CHANGES: dict[str, dict[str, str]] = {
    "threshold": {"shown_default": f"{DEFAULT_PREFILL_THRESHOLD}"},
    "min_tokens": {
        "shown_default": f"{MIN_TOKENS_CUDA} on CUDA, else {MIN_TOKENS_CPU}",
        "help": "With fewer tokens so far, a chunk runs dense.",
    },
}


@dataclass(frozen=True, slots=True)
class LongPrompt:
    """The prompt of `xattn-video prefill`, and what to measure.

    Raises:
        ValueError: A value is out of range.
    """

    model: str = knob(
        "demo (ships with the package), a hub ID, a folder, a .gguf file, or random:SHAPE (random "
        "weights, for speed and memory alone).",
        ...,
        panel="Prompt",
    )
    tokens: int | None = knob(
        "Tokens of the prompt.",
        panel="Prompt",
        shown_default=f"{DEFAULT_TOKENS}, or what the model's context holds",
    )
    chunk_size: int = knob("Tokens of a forward pass.", 32768, panel="Prompt")
    needle: str | None = knob(
        "Text to hide in filler and to ask for.",
        panel="Prompt",
        shown_default=f"{DEFAULT_NEEDLE}; demo {DEMO_NEEDLE}; none with random weights",
    )
    depth: float = knob(
        "Position of the needle: 0 at the beginning, 1 at the end.", 0.5, panel="Prompt"
    )
    beyond_context: bool = knob(
        "Allow more tokens than the model's context, for speed and memory alone.",
        False,
        "--beyond-context",
        panel="Prompt",
    )
    compare: str | None = knob(
        "Also run dense (without a mask of all keys) or sdpa (the model's own), and compare.",
        panel="Run",
        shown_default="sparse alone",
    )
    plan: bool = knob("Print the plan and stop.", False, "--plan", panel="Run")
    force: bool = knob("Run even if the memory seems too small.", False, "--force", panel="Run")
    report: Path | None = knob("JSON file: plan, times and what ran.", panel="Run")

    def __post_init__(self) -> None:
        for name in ("tokens", "chunk_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}; use 32768.")
        if not 0 <= self.depth <= 1:
            raise ValueError(f"depth must lie in [0, 1], got {self.depth:g}; use 0.5.")
        if self.compare not in (None, "dense", "sdpa"):
            raise ValueError(f"compare must be dense or sdpa, got {self.compare!r}.")
        if self.needle is not None and not self.needle.strip():
            raise ValueError("needle is empty; give a few words.")
        if self.needle is not None and self.needle.isdecimal() and not self.needle.isascii():
            # Models are trained on numbers in these, and may answer in them.
            digits = "".join(str(decimal(digit)) for digit in self.needle)
            raise ValueError(
                f"needle must have the digits 0 to 9 where it is a number, got {self.needle!r}; "
                f"use {digits}."
            )


@dataclass(frozen=True, slots=True)
class _FromFile:
    schedule: Path | None = knob(
        "JSON file with a threshold for each layer.", panel=SPARSITY, reads=True
    )


def prefill_settings() -> Group:
    """The options of `PrefillSettings`, when and how prefill is sparse."""
    options = {
        source.name: option(source, panel=SPARSITY, **_CHANGES.get(source.name, {}))
        for source in fields(SparseSettings)
        if source.name in ("threshold", *PREFILL_FIELDS)
    }
    options["dense_layers"] = option(
        next(source for source in fields(PrefillSettings) if source.name == "dense_layers"),
        panel=SPARSITY,
    )
    options["schedule"] = option(fields(_FromFile)[0])
    return Group(options, _make)


def _make(values: dict[str, Any]) -> PrefillSettings:
    check_one_way({f"--{name}": values[name] for name in ("threshold", "schedule", "density")})
    given = {name: values[name] for name in PREFILL_FIELDS if values[name] is not None}
    given["threshold"] = values["threshold"]
    if values["schedule"] is not None:
        schedule = read_schedule(values["schedule"])
        _check_points(schedule, values["schedule"])
        given[schedule.kind] = schedule
    return PrefillSettings.of(dense_layers=values["dense_layers"], **given)


def _check_points(schedule: ThresholdSchedule, file: Path) -> None:
    """Raise ValueError unless every layer and head has one point, at step 0."""
    for place, points in points_of_steps(schedule).items():
        raise ValueError(
            f"{file}: {place} must be one point at step 0, since a language model has no "
            f"denoising steps, got {[list(point) for point in points]}; write "
            f"[[0, {points[0][1]:g}]]."
        )
