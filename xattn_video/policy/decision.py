"""Decides what a denoising step does, dense or sparse; nothing else decides."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Literal, TypeAlias

from xattn_video.policy.presets import in_place_of_preset
from xattn_video.policy.schedule import ThresholdSchedule
from xattn_video.policy.settings import SparseSettings

DenseReason: TypeAlias = Literal[
    "warm-up", "cool-down", "threshold 1", "density 1", "too few tokens", "gradients", "last step"
]


@dataclass(frozen=True, slots=True)
class Run:
    """The sizes of a model, a video and a generation, as `decide` needs them.

    Attributes:
        num_layers, num_heads: Attention layers of the model, and heads of each layer.
        num_video_tokens: Video tokens of one item.
        device_type: Type of the device on which the layers run.
        num_steps: Denoising steps of the generation; None if unknown. A cool-down needs it.
        needs_grad: Whether gradients are needed anywhere in the model.
    """

    num_layers: int
    num_heads: int
    num_video_tokens: int
    device_type: str
    num_steps: int | None = None
    needs_grad: bool = False


@dataclass(frozen=True, slots=True)
class Decision:
    """What one denoising step does.

    Attributes:
        reason: Why every layer runs dense; None where at least one runs sparse.
        thresholds: Tau of every head, `[num_layers][num_heads]`, or the density in its place.
        threshold: Tau if it is one number for all layers and heads, else None.
        refreshing: Whether each layer computes the dense and the sparse output and keeps the
            residual. A layer that skipped no block when the others refreshed does so at its first
            sparse step after that.
        choosing: Whether each layer chooses blocks, anew or for the first time.
        last_sparse: Whether no later step runs sparse; False if unknown, or if nothing is kept
            between steps.
        keeps_all: The reason of a layer that runs dense because it keeps every block.
        step: The step.
        due: The first step of the current period; what a layer kept before it is out of date.
    """

    reason: DenseReason | None
    thresholds: tuple[tuple[float, ...], ...]
    threshold: float | None
    refreshing: tuple[bool, ...]
    choosing: tuple[bool, ...]
    last_sparse: bool = False
    keeps_all: DenseReason = "threshold 1"
    step: int = 0
    due: int = 0

    @property
    def sparse(self) -> bool:
        """Whether at least one layer runs sparse."""
        return self.reason is None

    @property
    def refreshes(self) -> bool:
        """Whether at least one layer refreshes."""
        return any(self.refreshing)

    @property
    def any_sparse_output(self) -> bool:
        """Whether any layer computes a sparse output, as its output or for the residual."""
        return self.sparse or self.refreshes

    def computes_sparsely(self, layer: int) -> bool:
        """Whether the layer computes a sparse output, as its output or for the residual."""
        return self.any_sparse_output and _skips(self.thresholds[layer])

    def layer_reason(self, layer: int) -> DenseReason | None:
        """Why a layer runs dense; None if it runs sparse."""
        if self.reason is None and not _skips(self.thresholds[layer]):
            return self.keeps_all
        return self.reason


def decide(settings: SparseSettings, step: int, run: Run) -> Decision:
    """Decide what a denoising step does; plan, progress, report and layers all call this.

    Args:
        settings: The settings of sparse attention.
        step: The step, counted from 0.
        run: Sizes of the model, the video and the generation.

    Raises:
        ValueError: A cool-down is set and the number of steps is unknown, ``refresh_every``
            exceeds it, or the schedule names a layer or a head that the model lacks.
    """
    every, num_steps = settings.refresh_every, run.num_steps
    if every is not None and num_steps is not None and every > num_steps:
        raise _refresh_after_the_end(settings, num_steps)
    reason = _dense_reason(settings, step, run)
    primes = _primes(settings, step, run)
    # A step that primes uses the thresholds of the step after it.
    taus = settings.schedule.per_head(step + primes, run.num_layers, run.num_heads)
    choosing, last_sparse, due = [False] * run.num_layers, False, step
    if reason is None or primes:
        choosing = [_skips(layer) for layer in taus]
    if reason is None and settings.keeps_between_steps:
        since = _steps_since_choice(settings, step, run)
        due = since[0] if since else step
        for earlier in since:
            # The last warm-up step chose with the thresholds of the step after it.
            sparse = max(earlier, settings.warmup_steps)
            before = settings.schedule.per_head(sparse, run.num_layers, run.num_heads)
            choosing = [
                new and not _skips(layer) for new, layer in zip(choosing, before, strict=True)
            ]
        last_sparse = num_steps is not None and not any(
            _is_sparse(settings, later, run) for later in range(step + 1, num_steps)
        )
    by_mass = settings.density is None
    return Decision(
        reason,
        tuple(map(tuple, taus)),
        taus[0][0] if by_mass and settings.schedule.is_uniform else None,
        tuple(choosing) if every is not None else (False,) * run.num_layers,
        tuple(choosing),
        last_sparse,
        settings.keeps_all_reason,
        step,
        due,
    )


def _refresh_after_the_end(settings: SparseSettings, num_steps: int) -> ValueError:
    others = in_place_of_preset(settings)
    remedy = "lower it, or run more steps"
    if others is not None:
        remedy = f"run more steps, or lower it and give {others}"
    return ValueError(
        "refresh_every must be at most the number of denoising steps, got "
        f"{settings.refresh_every} and {num_steps} steps; {remedy}."
    )


@dataclass(frozen=True, slots=True)
class StepCounts:
    """Numbers of steps of a generation, by what they do.

    Attributes:
        dense: Steps in which every layer runs dense.
        sparse: All other steps.
        refreshes: Sparse steps in which at least one layer also computes the dense output.
        primes: Dense steps that also compute the sparse output; 1 or 0.
        refreshed: Refreshes in sparse steps, counted by layer and divided by the number of layers.
        choices: Choices of blocks in all steps, counted likewise.
    """

    dense: int
    sparse: int = 0
    refreshes: int = 0
    primes: int = 0
    refreshed: float = 0
    choices: float = 0


def count_steps(settings: SparseSettings, run: Run) -> StepCounts:
    """Count the steps of a generation; ``run.num_steps`` must be known."""
    assert run.num_steps is not None
    decisions = [decide(settings, step, run) for step in range(run.num_steps)]
    sparse = [decision for decision in decisions if decision.sparse]
    refreshes = sum(decision.refreshes for decision in sparse)
    primes = sum(decision.refreshes for decision in decisions) - refreshes
    refreshed = sum(sum(decision.refreshing) for decision in sparse) / run.num_layers
    choices = sum(sum(decision.choosing) for decision in decisions) / run.num_layers
    return StepCounts(
        len(decisions) - len(sparse), len(sparse), refreshes, primes, refreshed, choices
    )


def mean_density(settings: SparseSettings, run: Run) -> float | None:
    """The requested density, averaged over the sparse steps; None with a threshold."""
    if settings.density is None or not isinstance(settings.density, ThresholdSchedule):
        return settings.density
    assert run.num_steps is not None
    decisions = [decide(settings, step, run) for step in range(run.num_steps)]
    shares = [
        share for one in decisions if one.sparse for layer in one.thresholds for share in layer
    ]
    return fmean(shares) if shares else 1.0


def _is_sparse(settings: SparseSettings, step: int, run: Run) -> bool:
    return _dense_reason(settings, step, run) is None


def _dense_reason(settings: SparseSettings, step: int, run: Run) -> DenseReason | None:
    """Why every layer of the step runs dense; None if at least one runs sparse."""
    first_cool = math.inf
    if settings.cooldown_steps:
        first_cool = _num_steps(run) - settings.cooldown_steps
    reason: DenseReason | None = None
    if step < settings.warmup_steps:
        reason = "warm-up"
    elif step >= first_cool:
        reason = "cool-down"
    elif _keeps_all(settings, step, run):
        reason = settings.keeps_all_reason
    elif run.num_video_tokens < settings.min_tokens_on(run.device_type):
        reason = "too few tokens"
    elif run.needs_grad:
        reason = "gradients"
    elif settings.refresh_every is not None and step + 1 == run.num_steps:
        reason = "last step"
    return reason


def _primes(settings: SparseSettings, step: int, run: Run) -> bool:
    """Whether the step is the last of the warm-up and keeps a residual for the step after it."""
    return (
        settings.refresh_every is not None
        and 0 <= step == settings.warmup_steps - 1
        and step + 1 != run.num_steps
        and _is_sparse(settings, step + 1, run)
    )


def _steps_since_choice(settings: SparseSettings, step: int, run: Run) -> list[int]:
    """The steps since all layers last chose blocks, that step first; [] if this is one."""
    made = [earlier for earlier in range(step) if _is_sparse(settings, earlier, run)]
    if _primes(settings, settings.warmup_steps - 1, run):
        made.insert(0, settings.warmup_steps - 1)
    every = settings.refresh_every or settings.mask_every
    return made[len(made) - len(made) % every :]


def _skips(taus: Sequence[float]) -> bool:
    """Whether a layer with these thresholds, one per head, may skip a block."""
    return any(tau != 1 for tau in taus)


def _keeps_all(settings: SparseSettings, step: int, run: Run) -> bool:
    """Whether every layer keeps all blocks in the step."""
    schedule = settings.schedule
    if schedule.is_uniform:
        return schedule.threshold(step) == 1
    taus = schedule.per_head(step, run.num_layers, run.num_heads)
    return not any(map(_skips, taus))


def _num_steps(run: Run) -> int:
    if run.num_steps is None:
        raise ValueError(
            "cooldown_steps needs the number of denoising steps, which a transformer does not "
            "know; use enable_xattention(pipe, cooldown_steps=...) on the pipeline that runs "
            "it, or pass it to processor.bind(transformer, num_steps=...)."
        )
    return run.num_steps
