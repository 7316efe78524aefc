"""Named settings: points on the measured front of picture against time."""

from typing import Any, Literal, TypeAlias, get_args

from xattn_video.policy.settings import SparseSettings

Preset: TypeAlias = Literal["quality", "balanced", "fast"]

_COMPACT = {"token_order": "hilbert", "compensation": "first-order"}
PRESETS: dict[Preset, dict[str, Any]] = {
    "quality": {"density": 0.2, "refresh_every": 6} | _COMPACT,
    "balanced": {"density": 0.1, "refresh_every": 12} | _COMPACT,
    "fast": {"density": 0.1, "refresh_every": 20} | _COMPACT,
}
"""Arguments of `SparseSettings`; docs/fewer-blocks.md has what was measured with each."""

_SETS = ("threshold", "density", "token_order", "compensation", "mask_every", "refresh_every")


def preset_settings(preset: str, **options: Any) -> SparseSettings:
    """The settings of a preset.

    Args:
        preset: A name in `PRESETS`.
        options: Fields of `SparseSettings` that a preset leaves open: ``stride``,
            ``block_size``, ``warmup_steps``, ``cooldown_steps``, ``min_tokens``, ``backend``,
            ``scoring_precision``, ``residual``.

    Raises:
        ValueError: There is no such preset, an option is one that presets set, or a value is out
            of range.
    """
    if preset not in get_args(Preset):
        raise ValueError(f"preset must be one of {', '.join(PRESETS)}, got {preset!r}.")
    contradicting = [name for name in _SETS if name in options]
    if contradicting:
        raise ValueError(
            f"preset={preset!r} sets {', '.join(_SETS)} itself, got {', '.join(contradicting)} "
            "too; leave either out."
        )
    return SparseSettings(**PRESETS[preset], **options)  # type: ignore[index]
