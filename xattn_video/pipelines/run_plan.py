"""Foretell a run from sizes alone: tokens, blocks, arithmetic, memory, and whether it pays."""

from dataclasses import asdict, dataclass
from typing import Any

import psutil
import torch

from xattn_video.backends.table import available_backends, resolve_backend
from xattn_video.errors import BackendUnavailableError
from xattn_video.ops.problem import Problem
from xattn_video.ops.scoring import check_precision
from xattn_video.pipelines.loading import LoadOptions, Offload
from xattn_video.pipelines.model_shape import ModelShape
from xattn_video.pipelines.request import VideoSettings
from xattn_video.policy.decision import Run, count_dense_steps
from xattn_video.policy.settings import SparseSettings

PAPER_DENSITIES = (0.34, 0.455)
"""Densities that the XAttention paper reports for HunyuanVideo; not a measurement of this run."""
DENSITIES = (0.2, *PAPER_DENSITIES, 0.6, 0.8)
# Tensors of the hidden size that a forward holds at its peak; fits the 36.3 GiB measured on an
# H100 for HunyuanVideo's transformer at 720x1280x129, 23.9 GiB of which are weights.
_HIDDEN_TENSORS = 18
_SMALL_SHARE = 0.5
_FEW_BLOCKS = 16
# What a CPU at one TFLOP/s does in an hour.
_SLOW_CPU_TFLOP = 3600
_GIB = 2**30


@dataclass(frozen=True, slots=True)
class SpeedupBound:
    """What cannot be exceeded at a density, counting matrix products alone."""

    density: float
    step: float
    """A sparse step against a dense one."""
    run: float
    """All steps, the dense ones included."""
    from_paper: bool


@dataclass(frozen=True, slots=True)
class MemoryEstimate:
    """GiB. An estimate; the VAE's decoding comes on top of none of it.

    Attributes:
        transformer, text_encoders, vae: Weights.
        activations: Of one forward of the transformer.
        peak: What the device holds at most.
        offload: Which parts wait in host memory.
        peaks: The peak of every way to offload that the device has.
    """

    transformer: float
    text_encoders: float
    vae: float
    activations: float
    peak: float
    offload: Offload
    peaks: dict[Offload, float]


@dataclass(frozen=True, slots=True)
class RunPlan:
    """What a run will do, as far as sizes tell."""

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
    dense_step_tflop: float
    attention_share: float
    scoring_share: float
    speedup_bounds: tuple[SpeedupBound, ...]
    memory: MemoryEstimate
    device: str
    device_is_here: bool
    dtype: str
    backend: str | None
    warnings: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return asdict(self)


def plan_run(
    shape: ModelShape, video: VideoSettings, sparse: SparseSettings | None, options: LoadOptions
) -> RunPlan:
    """Foretell a run. No weights are read, nothing is computed.

    Args:
        shape: Of the model.
        video: Size and sampling.
        sparse: None for dense attention throughout.
        options: Device, dtype and offload.

    Raises:
        ValueError: The schedule names a layer or a head that the model lacks.
    """
    settings = sparse or SparseSettings()
    grid = shape.grid(video.height, video.width, video.num_frames)
    video_tokens = grid[0] * grid[1] * grid[2]
    tokens = video_tokens + shape.text_tokens
    blocks = -(-tokens // settings.block_size)
    steps = video.num_inference_steps
    dense_steps = steps
    device, dtype = options.resolved_device, options.resolved_dtype
    if sparse:
        run = Run(shape.layers, shape.heads, video_tokens, device.type, steps)
        dense_steps = count_dense_steps(sparse, run)
    forwards = 2 if video.true_cfg_scale > 1 else 1
    attention = 4 * tokens**2 * shape.hidden * shape.layers
    linear = 2 * tokens * shape.linear_parameters * shape.layers
    share = attention / (attention + linear)
    # Half a product of queries and keys that are `stride` times fewer.
    scoring = 1 / (2 * settings.stride)
    memory = _estimate_memory(shape, tokens, options)
    problem = Problem(device, dtype, shape.head_dim, settings.block_size)
    backend = None
    tflop = forwards * (attention + linear) / 1e12
    warnings = []
    if sparse:
        warnings += _sparsity_warnings(
            sparse, dense_steps, steps, video_tokens, share, device.type
        )
        if options.device_is_here:
            backend, refusal = _resolve(settings.backend, problem)
            warnings += [refusal] if refusal else _backend_warnings(backend, device)
            warnings += _scoring_warnings(settings, problem)
    warnings += _cost_warnings(memory, tflop * steps, options)
    return RunPlan(
        grid=grid,
        video_tokens=video_tokens,
        text_tokens=shape.text_tokens,
        blocks=blocks,
        block_size=settings.block_size,
        last_block_tokens=tokens - (blocks - 1) * settings.block_size,
        layers=shape.layers,
        forwards_per_step=forwards,
        steps=steps,
        dense_steps=dense_steps,
        sparse_steps=steps - dense_steps,
        dense_step_tflop=tflop,
        attention_share=share,
        scoring_share=share * scoring,
        speedup_bounds=_speedup_bounds(share, scoring, steps, dense_steps) if sparse else (),
        memory=memory,
        device=str(device),
        device_is_here=options.device_is_here,
        dtype=str(dtype).removeprefix("torch."),
        backend=backend,
        warnings=tuple(warnings),
    )


def _speedup_bounds(
    share: float, scoring: float, steps: int, dense_steps: int
) -> tuple[SpeedupBound, ...]:
    """Amdahl's bound for a row of densities."""
    bounds = []
    for density in DENSITIES:
        sparse_cost = 1 - share + share * (density + scoring)
        run_cost = dense_steps + (steps - dense_steps) * sparse_cost
        bounds.append(
            SpeedupBound(density, 1 / sparse_cost, steps / run_cost, density in PAPER_DENSITIES)
        )
    return tuple(bounds)


def _estimate_memory(shape: ModelShape, tokens: int, options: LoadOptions) -> MemoryEstimate:
    """Weights from their number, activations from the size of the hidden states."""
    size = options.resolved_dtype.itemsize
    others = 2 if options.resolved_device.type == "cuda" else size
    transformer = shape.transformer_parameters * size / _GIB
    text_encoders = shape.text_parameters * others / _GIB
    vae = shape.vae_parameters * others / _GIB
    activations = _HIDDEN_TENSORS * tokens * shape.hidden * size / _GIB
    peaks: dict[Offload, float] = {"none": transformer + text_encoders + vae + activations}
    if options.resolved_device.type == "cuda":
        a_layer = transformer / shape.layers + activations
        peaks["model"] = max(transformer + activations, text_encoders, vae)
        peaks |= {"group": a_layer, "sequential": a_layer}
    offload = options.resolved_offload
    return MemoryEstimate(
        transformer, text_encoders, vae, activations, peaks[offload], offload, peaks
    )


def _resolve(name: str, problem: Problem) -> tuple[str | None, str | None]:
    """The backend that will run, or why none can."""
    try:
        return resolve_backend(name, problem), None
    except BackendUnavailableError as error:
        return None, str(error)


def _scoring_warnings(settings: SparseSettings, problem: Problem) -> list[str]:
    """Why the estimate cannot be had in the precision asked for."""
    try:
        check_precision(settings.scoring_precision, problem, settings.stride)
    except ValueError as error:
        return [str(error)]
    return []


def _sparsity_warnings(
    settings: SparseSettings,
    dense_steps: int,
    steps: int,
    video_tokens: int,
    share: float,
    device_type: str,
) -> list[str]:
    """Why sparse attention would not pay."""
    warnings = []
    blocks = video_tokens // settings.block_size
    min_tokens = settings.min_tokens_on(device_type)
    if video_tokens < min_tokens:
        warnings.append(
            f"No step is sparse: {video_tokens:,} video tokens are fewer than "
            f"min_tokens={min_tokens:,}, below which dense attention tends to be faster. "
            "Set it to 0 for sparse steps all the same."
        )
    elif dense_steps == steps:
        warnings.append(
            f"No step is sparse: warmup_steps={settings.warmup_steps}, "
            f"cooldown_steps={settings.cooldown_steps} and steps with a threshold of 1 "
            f"make up all {steps} steps. Lower them, or run more steps."
        )
    elif blocks < _FEW_BLOCKS:
        warnings.append(
            f"The clip is only {video_tokens:,} tokens; sparse attention needs thousands. "
            "Dense attention is likely faster."
        )
    if share < _SMALL_SHARE:
        warnings.append(
            f"Attention is {share:.0%} of a step's arithmetic: were it free, a step would be "
            f"{1 / (1 - share):.2f}x faster. Longer or larger videos gain more."
        )
    return warnings


def _backend_warnings(backend: str | None, device: torch.device) -> list[str]:
    """Whether a faster backend is missing."""
    if device.type != "cuda" or backend != "torch_gather":
        return []
    refused = available_backends(device)
    reasons = "; ".join(f"{name}: {', '.join(why)}" for name, why in refused.items() if why)
    return [f"Only the portable backend can run, which is slow on a GPU. {reasons}".rstrip()]


def _cost_warnings(memory: MemoryEstimate, tflop: float, options: LoadOptions) -> list[str]:
    """Whether the run is too large for where it would run."""
    device = options.resolved_device
    if device.type != "cuda":
        return _cpu_cost_warnings(memory, tflop)
    if not options.device_is_here:
        return []
    total = torch.cuda.get_device_properties(device).total_memory / _GIB
    if memory.peak < total:
        return []
    fitting = [name for name, peak in memory.peaks.items() if peak < total]
    remedy = f"Try --offload {' or '.join(fitting)}, or a" if fitting else "Try a"
    return [
        f"About {memory.peak:.0f} GiB are needed and the GPU has {total:.0f}. "
        f"{remedy} smaller video."
    ]


def _cpu_cost_warnings(memory: MemoryEstimate, tflop: float) -> list[str]:
    """Whether the run is too large for a CPU."""
    warnings = []
    total = psutil.virtual_memory().total / _GIB
    if memory.peak >= total:
        warnings.append(
            f"About {memory.peak:.0f} GiB are needed and this machine has {total:.0f}. "
            "Run a smaller video or model, or on another machine."
        )
    if tflop >= _SLOW_CPU_TFLOP:
        hours = tflop / _SLOW_CPU_TFLOP
        warnings.append(
            f"{tflop / 1000:,.0f} PFLOP on device 'cpu' take {hours:,.1f} hours at "
            "1 TFLOP/s, which few CPUs reach. Run it on a GPU; --device cuda plans for one."
        )
    return warnings
