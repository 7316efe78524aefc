"""Named settings: points on the measured front of picture quality against time."""

import json
from dataclasses import fields
from typing import Any, Literal, TypeAlias, get_args

from xattn_video.files import user_path
from xattn_video.policy.schedule import ThresholdSchedule, read_schedule
from xattn_video.policy.settings import SparseSettings

Preset: TypeAlias = Literal["quality", "balanced", "fast"]

_COMPACT = {"token_order": "hilbert", "compensation": "first-order"}
PRESETS: dict[Preset, dict[str, Any]] = {
    "quality": {"density": 0.15, "refresh_every": 10} | _COMPACT,
    "balanced": {"density": 0.1, "refresh_every": 15} | _COMPACT,
    "fast": {"density": 0.05, "refresh_every": 15} | _COMPACT,
}
"""Arguments of `SparseSettings`; docs/fewer-blocks.md has the measurements of each preset."""

SET_BY_PRESETS = (
    "threshold",
    "density",
    "token_order",
    "compensation",
    "mask_every",
    "refresh_every",
)
"""The fields that a preset sets."""


def preset_settings(preset: str, **options: Any) -> SparseSettings:
    """The settings of a preset.

    Args:
        preset: A name in `PRESETS`.
        options: Fields of `SparseSettings` that presets do not set: ``stride``, ``block_size``,
            ``warmup_steps``, ``cooldown_steps``, ``min_tokens``, ``backend``,
            ``scoring_precision``, ``residual``. A ``density`` by layer and head, a
            `ThresholdSchedule`, replaces the preset's density.

    Raises:
        ValueError: There is no such preset, an option is set by presets, or a value is out of
            range.
    """
    if preset not in get_args(Preset):
        raise ValueError(f"preset must be one of {', '.join(PRESETS)}, got {preset!r}.")
    calibrated = isinstance(options.get("density"), ThresholdSchedule)
    contradicting = [
        name
        for name in SET_BY_PRESETS
        if name in options and not (name == "density" and calibrated)
    ]
    if contradicting:
        raise ValueError(
            f"preset={preset!r} already sets {', '.join(SET_BY_PRESETS)}, got "
            f"{', '.join(contradicting)} too; omit one of them."
        )
    return SparseSettings(**PRESETS[preset] | options)  # type: ignore[index]


def in_place_of_preset(settings: SparseSettings) -> str | None:
    """What to give with another refresh_every in place of a preset; None for no preset's settings.

    Such as "density=0.05, token_order='hilbert' in place of preset='fast'".
    """
    for preset, values in PRESETS.items():
        if all(getattr(settings, name) == value for name, value in values.items()):
            others = [f"{k}={v!r}" for k, v in values.items() if k != "refresh_every"]
            return f"{', '.join(others)} in place of preset={preset!r}"
    return None


def settings_of(preset: str | None, **options: Any) -> SparseSettings:
    """The settings of a preset if one is named, else of the options alone.

    Raises:
        ValueError, TypeError: As in `preset_settings` and `SparseSettings`.
    """
    return SparseSettings(**options) if preset is None else preset_settings(preset, **options)


def parse_setting(text: str, **options: Any) -> SparseSettings:
    """The settings of a text such as "density=0.2,refresh_every=5" or "preset=fast".

    Args:
        text: NAME=VALUE,... with the fields of `SparseSettings` and ``preset`` as names. A
            density may be a JSON file with a schedule by layer and head.
        options: Other fields; the text overrides them.

    Raises:
        ValueError: The text has an unknown name or one name twice, contradicts a preset, or a
            value is out of range.
    """
    names = ("preset", *(source.name for source in fields(SparseSettings)))
    given: dict[str, Any] = {}
    for part in text.split(","):
        name, _, value = part.strip().partition("=")
        name = name.replace("-", "_")
        if name in given:
            raise ValueError(f"a setting must name {name} once, got it twice in {text!r}.")
        if name not in names or not value:
            raise ValueError(
                f"a setting must be NAME=VALUE,... with the names {', '.join(names)}, "
                f"got {part!r}."
            )
        try:
            given[name] = json.loads(value)
        except json.JSONDecodeError:
            given[name] = value
    if isinstance(given.get("density"), str):
        given["density"] = read_schedule(user_path(given["density"]))
    return settings_of(given.pop("preset", None), **options | given)
