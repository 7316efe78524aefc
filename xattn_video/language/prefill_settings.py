"""The settings of sparse prefill: `SparseSettings` without denoising steps, and dense layers."""

from dataclasses import dataclass, field, fields
from typing import Any

from xattn_video.errors import UnsupportedModelError
from xattn_video.policy.schedule import Points, ThresholdLike, ThresholdSchedule
from xattn_video.policy.settings import SparseSettings

DEFAULT_PREFILL_THRESHOLD = 0.9
# With half of the blocks, attention of SmolLM2-135M's shape takes as much CPU time as dense
# attention at 4,096 tokens, and less from 8,192 on.
MIN_TOKENS_CPU = 8192
# The fields of `SparseSettings` that apply without denoising steps.
PREFILL_FIELDS = (
    "stride",
    "block_size",
    "min_tokens",
    "backend",
    "scoring_precision",
    "density",
)
# What a `SparseSettings` may set.
_TAKEN = {"threshold", *PREFILL_FIELDS}
# Kinds of layers that see a limited number of tokens.
_WINDOWS = {"sliding_attention", "chunked_attention"}


@dataclass(frozen=True, slots=True)
class PrefillSettings:
    """When and how a language model's prefill is sparse.

    Attributes:
        sparse: The settings of sparse attention. Its warm-up is not used.
        dense_layers: Number of first layers that stay dense.

    Raises:
        ValueError, TypeError: A setting is out of range, of a wrong type, or differs between
            denoising steps, which a language model does not have.
    """

    sparse: SparseSettings
    dense_layers: int = field(
        default=0, metadata={"help": "Number of first layers that stay dense."}
    )

    def __post_init__(self) -> None:
        if isinstance(self.dense_layers, bool) or not isinstance(self.dense_layers, int):
            raise TypeError(f"dense_layers must be a whole number, got {self.dense_layers!r}.")
        if self.dense_layers < 0:
            raise ValueError(
                f"dense_layers must be at least 0, got {self.dense_layers}; use 0 for none."
            )
        for source in fields(self.sparse):
            value = getattr(self.sparse, source.name)
            # The warm-up is on by default, and no warm-up is what a language model has.
            unused = value == source.default or (source.name == "warmup_steps" and value == 0)
            if source.name not in _TAKEN and not unused:
                raise ValueError(
                    f"{source.name}={value!r} has no effect on a language model; remove it."
                )
        schedule = self.sparse.schedule
        if not isinstance(schedule, ThresholdSchedule) or points_of_steps(schedule):
            raise ValueError(
                "a language model has no denoising steps, so its threshold cannot differ between "
                "them; give one value, or a ThresholdSchedule with one point, at step 0, for each "
                "layer or head."
            )

    @classmethod
    def of(
        cls,
        threshold: "ThresholdLike | SparseSettings | None",
        dense_layers: int = 0,
        **options: Any,
    ) -> "PrefillSettings":
        """Settings from the arguments of `enable_xattention` or `register_attention`.

        Raises:
            ValueError, TypeError: As for the class, or an option is not for language models.
        """
        unknown = [name for name in options if name not in PREFILL_FIELDS]
        if unknown:
            raise TypeError(
                f"{unknown[0]} is not a setting for language models; use threshold, dense_layers, "
                f"{', '.join(PREFILL_FIELDS)}."
            )
        if threshold is None and options.get("density") is None:
            threshold = DEFAULT_PREFILL_THRESHOLD
        return cls(SparseSettings.of(threshold, **options), dense_layers)

    def min_tokens_on(self, device_type: str) -> int:
        """Number of tokens from which prefill runs sparse.

        The CUDA default is that of video attention: on an H100, causal attention with 7% of the
        blocks was faster than the best dense kernel from there on, and slower at half the length.
        """
        if self.sparse.min_tokens is None and device_type != "cuda":
            return MIN_TOKENS_CPU
        return self.sparse.min_tokens_on(device_type)

    def thresholds(self, layer: int | None, num_heads: int) -> list[float]:
        """Tau of every head of a layer, or the density in its place.

        Raises:
            ValueError: The thresholds differ between layers, and the layer has no number.
        """
        schedule = self.sparse.schedule
        if layer is None and not schedule.is_uniform:
            raise ValueError(
                "the thresholds differ between layers, but this layer has no layer_idx; give one "
                "threshold for all."
            )
        return [schedule.threshold(0, layer, head) for head in range(num_heads)]

    def layer_reason(self, layer: int | None, num_heads: int) -> str | None:
        """Why a layer runs dense with these settings; None if it can run sparse."""
        if layer is None and self.dense_layers:
            raise ValueError(
                f"dense_layers={self.dense_layers} counts layers, but this layer has no "
                "layer_idx; leave dense_layers out."
            )
        if layer is not None and layer < self.dense_layers:
            return "dense layer"
        keeps_all = all(tau == 1 for tau in self.thresholds(layer, num_heads))
        return self.sparse.keeps_all_reason if keeps_all else None

    def dense_reason(self, config: Any) -> str | None:
        """Why all full-attention layers of a text model run dense; None if one can run sparse."""
        kinds = getattr(config, "layer_types", None)
        if kinds is not None and "full_attention" not in kinds and _WINDOWS & {*kinds}:
            return "window"
        reason = None
        for layer in range(config.num_hidden_layers):
            if kinds is None or kinds[layer] == "full_attention":
                reason = self.layer_reason(layer, config.num_attention_heads)
                if reason is None:
                    return None
        return reason

    def check_config(self, config: Any, name: str) -> None:
        """Check the settings against a text model's configuration.

        Raises:
            UnsupportedModelError: The model, which is called ``name``, has no attention.
            ValueError: As `check_model`.
        """
        if getattr(config, "num_attention_heads", None) is None:
            raise UnsupportedModelError(
                f"{name} has no attention heads; use a language model with attention."
            )
        self.check_model(config.num_hidden_layers, config.num_attention_heads)

    def check_model(self, num_layers: int, num_heads: int) -> None:
        """Raise ValueError if the model lacks a named layer or head, or all layers stay dense."""
        if self.dense_layers >= num_layers:
            raise ValueError(
                f"dense_layers must be below the model's {num_layers} layers, got "
                f"{self.dense_layers}; use fewer."
            )
        schedule = self.sparse.schedule
        if isinstance(schedule, ThresholdSchedule):
            schedule.check_model(num_layers, num_heads)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        sparse = self.sparse.to_dict()
        used = ("threshold", *PREFILL_FIELDS)
        return {name: sparse[name] for name in used} | {"dense_layers": self.dense_layers}


def points_of_steps(schedule: ThresholdSchedule) -> dict[str, Points]:
    """{place in the schedule: its points} for all that are not one point at step 0."""
    found: dict[str, Points] = {"points": schedule.points}
    found |= {f"layers.{layer}": points for layer, points in schedule.layers.items()}
    found |= {f"heads.{layer}.{head}": one for (layer, head), one in schedule.heads.items()}
    return {
        place: points for place, points in found.items() if [step for step, _ in points] != [0]
    }
