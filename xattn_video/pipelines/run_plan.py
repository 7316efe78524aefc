"""Estimates a run from its sizes: tokens, blocks, FLOP, memory and possible speed-up."""

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch

from xattn_video.backends.table import available_backends, resolve_backend
from xattn_video.errors import BackendUnavailableError
from xattn_video.ops.problem import Problem
from xattn_video.ops.scoring import check_precision
from xattn_video.pipelines.cpu_speed import has_fast_dense
from xattn_video.pipelines.loading import LoadOptions
from xattn_video.pipelines.memory import (
    MemoryEstimate,
    describe_residual_shortage,
    describe_shortage,
    estimate_memory,
    find_room,
    with_residuals,
)
from xattn_video.pipelines.model_shape import ModelShape
from xattn_video.pipelines.request import VideoSettings
from xattn_video.policy.decision import Run, StepCounts, count_steps, mean_density
from xattn_video.policy.residual_size import residual_bytes
from xattn_video.policy.settings import SparseSettings

PAPER_DENSITIES = (0.34, 0.455)
"""Densities that the XAttention paper reports for HunyuanVideo; not a measurement of this run."""
DENSITIES = (0.2, *PAPER_DENSITIES, 0.6, 0.8)
_SMALL_SHARE = 0.5
_FEW_BLOCKS = 16
_FAST_DENSE = (
    "This CPU computes dense attention fast in bfloat16 (AMX). Sparse attention gains little or "
    "nothing at density 0.5, and less than in float32 at lower densities; the default of "
    "min_tokens was measured in float32."
)
# TFLOP in an hour on a CPU at one TFLOP/s.
_SLOW_CPU_TFLOP = 3600


@dataclass(frozen=True, slots=True)
class SpeedupBound:
    """The largest possible speed-up at a density, counting only matrix products."""

    density: float
    step: float
    """Of a sparse step that chooses its blocks, against a dense step."""
    run: float
    """Of all steps, dense ones included."""
    from_paper: bool


@dataclass(frozen=True, slots=True)
class SharePlan:
    """The gain of several GPUs that share the tokens of each video, counting only FLOP.

    Attributes:
        num_gpus: Number of GPUs.
        dense_step_speedup: The largest possible, against one GPU; each computes all text tokens.
        sent_gib: GiB that each GPU sends to the others in a step.
    """

    num_gpus: int
    dense_step_speedup: float
    sent_gib: float


@dataclass(frozen=True, slots=True)
class RunPlan:
    """What a run will do, estimated from its sizes."""

    grid: tuple[int, int, int]
    video_tokens: int
    text_tokens: int
    blocks: int
    block_size: int
    last_block_tokens: int
    layers: int
    forwards_per_step: int
    steps: int
    dense_steps: int
    sparse_steps: int
    refresh_steps: int
    """Sparse steps in which at least one layer also computes the dense output."""
    refreshed: float
    """Refreshes in these steps, counted by layer and divided by the number of layers."""
    density: float | None
    """Of the sparse steps, as asked for; None if a threshold decides."""
    dense_step_tflop: float
    attention_share: float
    scoring_share: float
    speedup_bounds: tuple[SpeedupBound, ...]
    memory: MemoryEstimate
    shortage: str | None
    """Why the run cannot fit in the memory, and what would fit; None if it may fit."""
    device: str
    device_is_here: bool
    dtype: str
    backend: str | None
    share: SharePlan
    warnings: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return asdict(self)


def plan_run(
    shape: ModelShape, video: VideoSettings, sparse: SparseSettings | None, options: LoadOptions
) -> RunPlan:
    """Estimate a run without reading weights or computing anything.

    Args:
        shape: The sizes of the model.
        video: Size and sampling.
        sparse: When and how attention is sparse; None for dense attention throughout.
        options: Device, dtype and offload.

    Raises:
        ValueError: The schedule names a layer or a head that the model lacks,
            ``refresh_every`` exceeds the number of steps, or the GPUs cannot share the heads.
    """
    if shape.heads % options.num_gpus:
        raise ValueError(
            f"{shape.heads} heads cannot be divided evenly among {options.num_gpus} GPUs, so the "
            "GPUs cannot generate one video together; use another number of GPUs, or generate "
            "--prompts-file with --parallel prompts."
        )
    settings = sparse or SparseSettings()
    grid = shape.grid(video.height, video.width, video.num_frames)
    video_tokens = math.prod(grid)
    tokens = video_tokens + shape.text_tokens
    blocks = -(-tokens // settings.block_size)
    device = options.resolved_device
    counts = planned_steps(shape, video, sparse, device.type)
    forwards = 2 if video.true_cfg_scale > 1 else 1
    flop, share = _arithmetic(shape, tokens)
    tflop = forwards * flop / 1e12
    # Scores cost 1 / stride of one of attention's two matrix products.
    scoring = 1 / (2 * settings.stride)
    memory, shortage = _memory(shape, video, settings, options, counts)
    backend, warnings, asked = None, list[str](), None
    if sparse:
        asked = mean_density(sparse, _run(shape, video, device.type))
        backend, found = _choose_backend(shape, sparse, options)
        warnings = _sparsity_warnings(sparse, counts, video_tokens, share, options) + found
    warnings += [shortage] if shortage else []
    warnings += _slow_cpu(options, tflop * video.num_inference_steps)
    return RunPlan(
        grid=grid,
        video_tokens=video_tokens,
        text_tokens=shape.text_tokens,
        blocks=blocks,
        block_size=settings.block_size,
        last_block_tokens=tokens - (blocks - 1) * settings.block_size,
        layers=shape.layers,
        forwards_per_step=forwards,
        steps=video.num_inference_steps,
        dense_steps=counts.dense,
        sparse_steps=counts.sparse,
        refresh_steps=counts.refreshes,
        refreshed=counts.refreshed,
        density=asked,
        dense_step_tflop=tflop,
        attention_share=share,
        scoring_share=share * scoring,
        speedup_bounds=_speedup_bounds(share, scoring, counts, asked) if sparse else (),
        memory=memory,
        shortage=shortage,
        device=str(device),
        device_is_here=options.device_is_here,
        dtype=str(options.resolved_dtype).removeprefix("torch."),
        backend=backend,
        share=_share_plan(shape, video_tokens, forwards, options),
        warnings=tuple(warnings),
    )


def planned_steps(
    shape: ModelShape, video: VideoSettings, sparse: SparseSettings | None, device_type: str
) -> StepCounts:
    """The numbers of steps by what they do; all are dense without sparse settings."""
    if sparse is None:
        return StepCounts(dense=video.num_inference_steps)
    return count_steps(sparse, _run(shape, video, device_type))


def _run(shape: ModelShape, video: VideoSettings, device_type: str) -> Run:
    tokens = math.prod(shape.grid(video.height, video.width, video.num_frames))
    return Run(shape.layers, shape.heads, tokens, device_type, video.num_inference_steps)


def _arithmetic(shape: ModelShape, tokens: int) -> tuple[float, float]:
    """FLOP of the layers in one forward pass, and the share of attention in them."""
    attention = 4 * tokens**2 * shape.hidden * shape.layers
    linear = 2 * tokens * shape.linear_parameters * shape.layers
    return attention + linear, attention / (attention + linear)


def dense_step_flop(shape: ModelShape, video: VideoSettings) -> float:
    """Floating-point operations of a dense step in the transformer's layers."""
    tokens = math.prod(shape.grid(video.height, video.width, video.num_frames))
    forwards = 2 if video.true_cfg_scale > 1 else 1
    return forwards * _arithmetic(shape, tokens + shape.text_tokens)[0]


def _share_plan(
    shape: ModelShape, video_tokens: int, forwards: int, options: LoadOptions
) -> SharePlan:
    count, text_tokens = options.num_gpus, shape.text_tokens
    alone, share = _arithmetic(shape, video_tokens + text_tokens)
    own_tokens = video_tokens / count + text_tokens
    linear = alone * (1 - share) * own_tokens / (video_tokens + text_tokens)
    # Rows sent: queries, keys and values of the video, then the output of video and text.
    rows = (3 * video_tokens / count + own_tokens) * (count - 1) / count
    sent = rows * shape.hidden * options.resolved_dtype.itemsize * shape.layers * forwards
    return SharePlan(count, alone / (alone * share / count + linear), sent / 2**30)


def _memory(
    shape: ModelShape,
    video: VideoSettings,
    settings: SparseSettings,
    options: LoadOptions,
    counts: StepCounts,
) -> tuple[MemoryEstimate, str | None]:
    """The memory, residuals included, and why the run cannot fit, or None."""
    room = find_room(options)
    shortage = describe_shortage(shape, video, options, room)
    memory = estimate_memory(shape, video, options, room)
    if not (counts.refreshes or counts.primes):
        return memory, shortage
    kept = residual_bytes(
        batch=2 if video.true_cfg_scale > 1 else 1,
        tokens=math.prod(shape.grid(video.height, video.width, video.num_frames))
        + shape.text_tokens,
        heads=shape.heads,
        head_dim=shape.head_dim,
        layers=shape.layers,
        scale_bytes=options.resolved_dtype.itemsize,
    )
    on_cuda = options.resolved_device.type == "cuda"
    with_kept = with_residuals(memory, kept, settings.residual, room, on_cuda)
    return with_kept, shortage or describe_residual_shortage(with_kept, memory, room, on_cuda)


def _speedup_bounds(
    share: float, scoring: float, counts: StepCounts, asked: float | None
) -> tuple[SpeedupBound, ...]:
    """Amdahl's bound for several densities, including the requested one."""
    bounds = []
    for density in sorted({*DENSITIES, *([] if asked is None else [asked])}):
        sparse_cost = 1 - share + share * (density + scoring)
        # Attention of the whole run, in units of a dense step's attention.
        attentions = counts.dense + counts.refreshed + counts.choices * scoring
        attentions += (counts.sparse + counts.primes) * density
        steps = counts.dense + counts.sparse
        run_cost = steps * (1 - share) + attentions * share
        bounds.append(
            SpeedupBound(density, 1 / sparse_cost, steps / run_cost, density in PAPER_DENSITIES)
        )
    return tuple(bounds)


def _choose_backend(
    shape: ModelShape, settings: SparseSettings, options: LoadOptions
) -> tuple[str | None, list[str]]:
    """The backend that will run, and warnings if none, a faster one or 8 bits cannot run.

    Returns None and no warnings for a device in another machine.
    """
    device = options.resolved_device
    problem = Problem(
        device,
        options.resolved_dtype,
        shape.head_dim,
        settings.block_size,
        lse=settings.needs_lse,
    )
    backend, warnings = None, list[str]()
    if not options.device_is_here:
        return backend, warnings
    try:
        backend = resolve_backend(settings.backend, problem)
        warnings += _backend_warnings(backend, device)
    except BackendUnavailableError as error:
        warnings.append(str(error))
    try:
        check_precision(settings.scoring_precision, problem, settings.stride)
    except ValueError as error:
        warnings.append(str(error))
    return backend, warnings


def why_all_dense(
    settings: SparseSettings, counts: StepCounts, video_tokens: int, device_type: str
) -> str | None:
    """Why no step of a video is sparse; None if some are."""
    min_tokens = settings.min_tokens_on(device_type)
    if video_tokens < min_tokens:
        return (
            f"No step is sparse: {video_tokens:,} video tokens are fewer than "
            f"min_tokens={min_tokens:,}, below which dense attention tends to be faster. "
            "Set it to 0 to run sparse steps anyway."
        )
    if counts.sparse:
        return None
    return (
        f"No step is sparse: warmup_steps={settings.warmup_steps}, "
        f"cooldown_steps={settings.cooldown_steps} and steps with a threshold of 1 "
        f"make up all {counts.dense} steps. Lower them, or run more steps."
    )


def _sparsity_warnings(
    settings: SparseSettings,
    counts: StepCounts,
    video_tokens: int,
    share: float,
    options: LoadOptions,
) -> list[str]:
    """Warnings that sparse attention gains little or nothing."""
    warnings = []
    blocks = video_tokens // settings.block_size
    dense = why_all_dense(settings, counts, video_tokens, options.resolved_device.type)
    if dense is not None:
        warnings.append(dense)
    elif blocks < _FEW_BLOCKS:
        warnings.append(
            f"The clip is only {video_tokens:,} tokens; sparse attention needs thousands. "
            "Dense attention is likely faster."
        )
    if share < _SMALL_SHARE:
        warnings.append(
            f"Attention is {share:.0%} of a step's arithmetic. If it took no time, a step would "
            f"be {1 / (1 - share):.2f}x faster. Longer or larger videos gain more."
        )
    if counts.sparse and has_fast_dense(options.resolved_device, options.resolved_dtype):
        warnings.append(_FAST_DENSE)
    return warnings


def _backend_warnings(backend: str, device: torch.device) -> list[str]:
    """Warnings that a faster backend is missing."""
    if device.type != "cuda" or backend != "torch_gather":
        return []
    refused = available_backends(device)
    reasons = "; ".join(f"{name}: {', '.join(why)}" for name, why in refused.items() if why)
    return [f"Only the portable backend can run, which is slow on a GPU. {reasons}".rstrip()]


def _slow_cpu(options: LoadOptions, tflop: float) -> list[str]:
    """A warning that a CPU would take hours."""
    if options.resolved_device.type != "cpu" or tflop < _SLOW_CPU_TFLOP:
        return []
    return [
        f"{tflop / 1000:,.0f} PFLOP on device 'cpu' take {tflop / _SLOW_CPU_TFLOP:,.1f} hours "
        "at 1 TFLOP/s, which few CPUs reach. Run it on a GPU; --device cuda plans for one."
    ]
