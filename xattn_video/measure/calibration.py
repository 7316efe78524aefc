"""Finds densities by layer and head from the errors of sparse attention in a few dense videos.

At some steps of a dense generation, each layer's attention is computed again, sparse with several
shares of the blocks, and the error of each head is recorded. The blocks are then allotted to the
heads where they lower the sum of the errors most.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from statistics import fmean
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor

from xattn_video.ops.blocks import BlockLists
from xattn_video.pipelines.generation import StepRecord, generate_together
from xattn_video.pipelines.request import GenerationRequest
from xattn_video.policy.schedule import ThresholdSchedule
from xattn_video.policy.settings import SparseSettings
from xattn_video.processors.binding import family_of
from xattn_video.processors.engine import dense_attention, sparse_attention
from xattn_video.processors.recorder import AttendedLayer, ForwardPass
from xattn_video.processors.residual import Residual

if TYPE_CHECKING:
    from diffusers import HunyuanVideoPipeline

# Shares to measure, as multiples of the wanted density.
_FACTORS = (0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 5.0)
# Most steps of a video at which blocks are chosen to be measured.
_MOST_CHOICES = 6
# When errors are measured, as a fraction of the period between two choices of blocks.
_AGES = (0.25, 0.6, 0.95)
# Tokens of a layer to measure, spread over the video; residuals of all would fill the host memory.
_MOST_TOKENS = 4096

Head: TypeAlias = tuple[int, int]
"""Layer and head, both from 0."""
OnStep: TypeAlias = Callable[[StepRecord], None]


@dataclass(frozen=True, slots=True)
class SharePoint:
    """The cost and the error of a head with a share of the blocks.

    Attributes:
        share: The requested share.
        density: Kept over valid blocks.
        error: Mean squared error of the attention output over its mean square.
    """

    share: float
    density: float
    error: float


Curves: TypeAlias = Mapping[Head, Sequence[SharePoint]]


@dataclass(frozen=True, slots=True)
class LayerShares:
    """The least and the largest density of a layer's heads."""

    layer: str
    least: float
    largest: float


@dataclass(frozen=True, slots=True)
class Calibration:
    """Densities by layer and head, and the expected gain.

    Attributes:
        schedule: The densities, a schedule of kind ``"density"``.
        density: Mean of kept over valid blocks, the same for uniform and calibrated densities.
        uniform_error, calibrated_error: Errors as in `SharePoint`, means over the heads.
        layers: The range of densities of each layer.
    """

    schedule: ThresholdSchedule
    density: float
    uniform_error: float
    calibrated_error: float
    layers: tuple[LayerShares, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON, without the schedule, which has its own file."""
        values = asdict(self)
        del values["schedule"]
        return values


def measured_steps(settings: SparseSettings, num_steps: int) -> dict[int, tuple[int, ...]]:
    """{step that chooses blocks: the steps at which their errors are measured}."""
    keeps_residual = settings.refresh_every is not None
    period = settings.refresh_every or settings.mask_every
    # With residuals the last warm-up step chooses blocks, and the very last step runs dense.
    first = max(settings.warmup_steps - keeps_residual, 0)
    end = min(num_steps - settings.cooldown_steps, num_steps - keeps_residual)
    choices = range(first, end, period)
    count = min(len(choices), _MOST_CHOICES)
    chosen = [choices[round(n * (len(choices) - 1) / max(count - 1, 1))] for n in range(count)]
    found = {}
    for step in chosen:
        length = min(period, end - step)
        ages = {max(int(keeps_residual), min(round(length * age), length - 1)) for age in _AGES}
        found[step] = tuple(sorted(step + age for age in ages if age < length))
    return {step: measured for step, measured in found.items() if measured}


class AttentionErrors:
    """An observer of dense generations that measures sparse attention's error by layer and head.

    Args:
        settings: How blocks are chosen and residuals kept; the density must be a number.
        layers: The names of the layers in the model's order.
        num_steps: Denoising steps of each generation.

    Raises:
        ValueError: No step would be sparse.
    """

    def __init__(self, settings: SparseSettings, layers: Sequence[str], num_steps: int) -> None:
        assert isinstance(settings.density, float | int)
        shares = (factor * settings.density for factor in _FACTORS)
        self.shares = tuple(share for share in shares if share < 1)
        self._settings = settings
        self._layers = {name: number for number, name in enumerate(layers)}
        self._steps = measured_steps(settings, num_steps)
        if not self._steps:
            raise ValueError(
                f"no step is sparse: {num_steps} steps, warmup_steps={settings.warmup_steps}, "
                f"cooldown_steps={settings.cooldown_steps}, "
                f"refresh_every={settings.refresh_every}; run more steps."
            )
        self._measuring = {step for steps in self._steps.values() for step in steps}
        # {(layer, number of the share): density and error of the heads, `[2, H]`}.
        self._found: dict[tuple[int, int], list[Tensor]] = defaultdict(list)
        self.begin()

    def begin(self) -> None:
        """Start observing another generation."""
        self._kept: dict[tuple[int, int, int], tuple[Tensor, int, Residual | None]] = {}
        self.step_ends(-1)

    def step_ends(self, index: int) -> None:
        """Record that the denoising step ``index`` has ended."""
        self._step, self._pass = index + 1, -1
        self._seen: ForwardPass | None = None

    def __call__(self, seen: AttendedLayer) -> None:
        if self._step not in self._steps and self._step not in self._measuring:
            return
        if seen.forward is not self._seen:
            self._seen, self._pass = seen.forward, self._pass + 1
            self._forward = self._as_sparse(seen)
        forward = self._forward
        query, key, value = (
            forward.layout.to_canonical(seen.forward.layout.from_canonical(tokens))
            for tokens in (seen.query, seen.key, seen.value)
        )
        dense = dense_attention(query, key, value, forward.layout, forward.dense_backend)
        layer = self._layers[seen.layer]
        for number in range(len(self.shares)):
            self._measure(layer, number, (query, key, value), dense)

    def _as_sparse(self, seen: AttendedLayer) -> ForwardPass:
        """The forward pass with the settings of sparse attention."""
        settings, layout = self._settings, seen.forward.layout
        backend = settings.backend_for(
            layout.device,
            seen.value.dtype,
            seen.value.shape[-1],
            causal=layout.causal,
            ragged=layout.ragged,
        )
        if settings.token_order == "hilbert":
            layout = layout.along_hilbert_curve()
        return replace(seen.forward, settings=settings, layout=layout, backend=backend)

    def _measure(
        self, layer: int, number: int, inputs: tuple[Tensor, Tensor, Tensor], dense: Tensor
    ) -> None:
        """Compute a share of the blocks, chosen now or kept, and record the error."""
        forward, device = self._forward, dense.device
        place, blocks, residual = (self._pass, layer, number), None, None
        chooses = self._step in self._steps
        if not chooses:
            bits, columns, residual = self._kept[place]
            blocks = BlockLists.from_bits(bits.to(device), columns)
        share = torch.tensor(self.shares[number], device=device)
        out, blocks = sparse_attention(*inputs, share, forward, blocks)
        video = forward.layout.num_video_tokens
        rows = slice(0, video, -(-video // _MOST_TOKENS))
        out, exact = out[:, rows], dense[:, rows]
        if chooses:
            if self._settings.refresh_every is not None:
                residual = _on(Residual.between(exact, out), "cpu")
            self._kept[place] = blocks.to_bits().cpu(), blocks.indices.shape[-1], residual
        if self._step in self._measuring:
            if residual is not None:
                out = _on(residual, device).added_to(out)
            missed = (out - exact).float().square().sum((1, 3))
            whole = exact.float().square().sum((1, 3))
            error = (missed / whole.clamp_min(torch.finfo(whole.dtype).tiny)).mean(0)
            valid = forward.layout.count_valid_blocks(forward.settings.block_size)
            density = blocks.counts.sum((0, 2)) / valid
            self._found[layer, number].append(torch.stack([density, error]).cpu())

    @property
    def curves(self) -> dict[Head, list[SharePoint]]:
        """{head: its points}, means over all measurements."""
        curves: dict[Head, list[SharePoint]] = defaultdict(list)
        for (layer, number), found in sorted(self._found.items()):
            densities, errors = torch.stack(found).double().mean(0).tolist()
            for head, (density, error) in enumerate(zip(densities, errors, strict=True)):
                curves[layer, head].append(SharePoint(self.shares[number], density, error))
        return dict(curves)


def _on(residual: Residual, device: torch.device | str) -> Residual:
    return Residual(residual.values.to(device), residual.scales.to(device))


def lower_hull(points: Sequence[SharePoint]) -> list[SharePoint]:
    """The lower convex hull of the points, ending where every block is kept."""
    found: list[SharePoint] = []
    every_block = SharePoint(1.0, 1.0, 0.0)
    # Of shares that round to the same blocks the largest comes first, and is kept.
    order = sorted([*points, every_block], key=lambda one: (one.density, one.error, -one.share))
    for point in order:
        if found and point.error >= found[-1].error:
            continue
        while len(found) > 1 and _slope(found[-2], found[-1]) <= _slope(found[-2], point):
            found.pop()
        found.append(point)
    return found


def _slope(first: SharePoint, second: SharePoint) -> float:
    """Decrease of the error per increase of the density."""
    return (first.error - second.error) / (second.density - first.density)


def allot(curves: Curves, density: float) -> dict[Head, SharePoint]:
    """The shares with the least sum of (interpolated) errors at a mean density.

    Blocks go to the head whose error they lower most, along the lower hull of its points.
    """
    hulls = {head: lower_hull(points) for head, points in curves.items()}
    found = {head: hull[0] for head, hull in hulls.items()}
    room = density * len(hulls) - sum(point.density for point in found.values())
    pieces = [(head, *piece) for head, hull in hulls.items() for piece in pairwise(hull)]
    for head, first, second in sorted(pieces, key=lambda piece: -_slope(*piece[1:])):
        cost = second.density - first.density
        part = min(1.0, room / cost)
        if part <= 0:
            break
        room -= part * cost
        found[head] = SharePoint(
            first.share + part * (second.share - first.share),
            first.density + part * cost,
            first.error + part * (second.error - first.error),
        )
    return found


def calibration_of(curves: Curves, density: float, layers: Sequence[str]) -> Calibration:
    """The calibration that costs as much as one density for all heads.

    Args:
        curves: {head: its points}; one point of each head has the share ``density``.
        density: The uniform density to compare with.
        layers: The names of the layers.
    """
    uniform = [point for points in curves.values() for point in points if point.share == density]
    mean = fmean(point.density for point in uniform)
    found = allot(curves, mean)
    shares = {head: round(point.share, 4) for head, point in found.items()}
    by_layer: dict[int, list[float]] = defaultdict(list)
    for (layer, _), share in shares.items():
        by_layer[layer].append(share)
    return Calibration(
        ThresholdSchedule(
            ((0, density),),
            heads={head: ((0, share),) for head, share in shares.items()},
            kind="density",
        ),
        mean,
        fmean(point.error for point in uniform),
        fmean(point.error for point in found.values()),
        tuple(LayerShares(layers[n], min(of), max(of)) for n, of in sorted(by_layer.items())),
    )


def calibrate(
    pipe: "HunyuanVideoPipeline",
    requests: Sequence[GenerationRequest],
    settings: SparseSettings,
    progress: Callable[[GenerationRequest], AbstractContextManager[OnStep]],
) -> Calibration:
    """Generate the requests with dense attention and find the densities.

    Args:
        pipe: The loaded pipeline; its attention processors are restored afterwards.
        requests: What to generate; their sparse settings do not matter.
        settings: The sparse settings; the density must be a number, the wanted mean.
        progress: Function that opens a display for the steps of a request.

    Raises:
        ValueError: No step would be sparse.
    """
    assert isinstance(settings.density, float | int)
    layers = tuple(family_of(pipe.transformer).attentions(pipe.transformer))
    errors = AttentionErrors(settings, layers, requests[0].video.num_inference_steps)
    for request in requests:
        errors.begin()
        with progress(request) as shown:

            def step_ends(record: StepRecord, shown: OnStep = shown) -> None:
                errors.step_ends(record.index)
                shown(record)

            generate_together(
                pipe, [replace(request, sparse=SparseSettings(1.0))], step_ends, (errors,)
            )
    return calibration_of(errors.curves, settings.density, layers)
