"""Estimates the memory of a run, and chooses the offload by the free memory."""

from bisect import bisect_left
from dataclasses import dataclass, replace
from pathlib import Path

import psutil
import torch

from xattn_video.pipelines.loading import LoadOptions, Offload
from xattn_video.pipelines.model_shape import ModelShape, read_model_shape
from xattn_video.pipelines.request import SIZE_STEP, VideoSettings
from xattn_video.pipelines.source import find_model
from xattn_video.policy.settings import ResidualPlace

# Tensors of the hidden size that a forward pass holds at its peak. Fits the 36.3 GiB measured on
# an H100 for HunyuanVideo's transformer at 720x1280x129, of which 23.9 GiB are weights.
_HIDDEN_TENSORS = 18
# Tensors of the video's size, with the VAE's fewest channels, that decoding holds. Fits the
# 1.07 GiB measured on a CPU for the demo model's VAE at 384x384x65.
_VAE_TENSORS = 2
# Copies of the decoded frames that exist at once: the tiles, and the video made of them.
_FRAME_COPIES = 2
# Size of the tiles that `enable_tiling` sets up, in pixels and frames.
_TILE_SIDE, _TILE_FRAMES = 256, 17
# Pixels of all tiles over pixels of the video: tiles are 4/3 as long as their spacing.
_TILE_OVERLAP = (4 / 3) ** 3
# Host memory of Python, torch and Diffusers.
_PROCESS_GIB = 1.0
# Group offload pins a copy of all weights: 78 GiB on the host for HunyuanVideo's 38.6.
_GROUP_COPIES = 2
_FASTEST_FIRST: tuple[Offload, ...] = ("none", "model", "group", "sequential")
# Fractions of the requested height and width to try if no number of frames fits.
_SMALLER_SIDES = (1.0, 0.75, 0.5, 0.25, 0.125)
_CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")
_GIB = 2**30


@dataclass(frozen=True, slots=True)
class Room:
    """The memory that a run may use, in GiB; None if unknown."""

    gpu: float | None
    host: float | None


@dataclass(frozen=True, slots=True)
class MemoryEstimate:
    """The estimated memory of a run, in GiB.

    Attributes:
        transformer, text_encoders, vae: Weights.
        activations: Activations of one forward pass of the transformer.
        decoding: Activations of the VAE's decoder, and the decoded frames.
        peak: Peak memory of the device.
        host: Peak host memory of the process.
        offload: Which parts wait in host memory.
        offload_reason: Why this offload was chosen.
        peaks, hosts: `peak` and `host` of every offload that the device supports.
        residuals: Residuals that refreshes keep; see `with_residuals`.
        residuals_on_host: Whether they are part of ``host`` and not of ``peak``.
    """

    transformer: float
    text_encoders: float
    vae: float
    activations: float
    decoding: float
    peak: float
    host: float
    offload: Offload
    offload_reason: str
    peaks: dict[Offload, float]
    hosts: dict[Offload, float]
    residuals: float = 0.0
    residuals_on_host: bool = False

    def fits(self, offload: Offload, room: Room) -> bool:
        """Whether an offload fits in the memory; unknown memory counts as enough."""
        on_gpu = room.gpu is None or self.peaks[offload] <= room.gpu
        return on_gpu and (room.host is None or self.hosts[offload] <= room.host)


def find_room(options: LoadOptions) -> Room:
    """The free memory of device and host; for a device elsewhere, only ``gpu_memory``."""
    if options.gpu_memory is not None or not options.device_is_here:
        return Room(options.gpu_memory, None)
    host = psutil.virtual_memory().available / _GIB
    if _CGROUP_LIMIT.is_file():  # the limit of a container or a batch system
        limit = _CGROUP_LIMIT.read_text().strip()
        host = min(host, int(limit) / _GIB) if limit.isdigit() else host
    device = options.resolved_device
    gpu = torch.cuda.mem_get_info(device)[0] / _GIB if device.type == "cuda" else None
    return Room(gpu, host / options.processes)


def estimate_memory(
    shape: ModelShape, video: VideoSettings, options: LoadOptions, room: Room
) -> MemoryEstimate:
    """Estimate the memory from the number of weights and the size of the video.

    Args:
        shape: The sizes of the model.
        video: The size of the video.
        options: How to load; if the offload is None, the fastest that fits in ``room`` is chosen.
        room: The free memory.
    """
    on_gpu = options.resolved_device.type == "cuda"
    size = options.resolved_dtype.itemsize
    others = 2 if on_gpu else size
    transformer = shape.transformer_parameters * size / _GIB
    text_encoders = shape.text_parameters * others / _GIB
    vae = shape.vae_parameters * others / _GIB
    grid = shape.grid(video.height, video.width, video.num_frames)
    tokens = grid[0] * grid[1] * grid[2] + shape.text_tokens
    activations = _HIDDEN_TENSORS * tokens * shape.hidden * size / _GIB / options.num_gpus
    decoding = _decoding_gib(shape, video, options, others)
    # Frames as the VAE returns them, in float32 and as bytes.
    values = 3 * video.num_frames * video.height * video.width
    frames = values * (others + 4 + 1) / _GIB
    weights = transformer + text_encoders + vae
    computing = max(activations, decoding)
    peaks: dict[Offload, float] = {"none": weights + computing}
    hosts: dict[Offload, float] = {"none": weights + max(computing, frames)}
    if on_gpu:
        peaks["model"] = max(transformer + activations, text_encoders, vae + decoding)
        peaks["group"] = peaks["sequential"] = transformer / shape.layers + computing
        # While loading, all weights are on the host.
        hosts = {"none": max(weights, frames), "model": weights + frames}
        hosts |= {"group": _GROUP_COPIES * weights + frames, "sequential": weights + frames}
    hosts = {name: gib + _PROCESS_GIB for name, gib in hosts.items()}
    offload = options.resolved_offload
    found = MemoryEstimate(
        transformer,
        text_encoders,
        vae,
        activations,
        decoding,
        peaks[offload],
        hosts[offload],
        offload,
        "as requested" if options.offload is not None else "the default",
        peaks,
        hosts,
    )
    return found if options.offload is not None or not on_gpu else _choose(found, room)


def with_residuals(
    memory: MemoryEstimate, num_bytes: int, place: ResidualPlace, room: Room, on_gpu: bool
) -> MemoryEstimate:
    """The estimate with the residuals of refreshes; ``auto`` places them where they fit."""
    gib = num_bytes / _GIB
    short = room.gpu is not None and memory.peak + gib > room.gpu
    on_host = on_gpu and (place == "host" or (place == "auto" and short))
    peaks, hosts = memory.peaks, memory.hosts
    if not on_host:
        peaks = {name: peak + gib for name, peak in peaks.items()}
    if on_host or not on_gpu:
        hosts = {name: host + gib for name, host in hosts.items()}
    return replace(
        memory,
        peak=peaks[memory.offload],
        host=hosts[memory.offload],
        peaks=peaks,
        hosts=hosts,
        residuals=gib,
        residuals_on_host=on_host,
    )


def describe_residual_shortage(
    memory: MemoryEstimate, without: MemoryEstimate, room: Room, on_gpu: bool
) -> str | None:
    """Why the residuals do not fit, and what would fit.

    Args:
        memory: The estimate with residuals.
        without: The same run's without them, which fits.
        room: The free memory.
        on_gpu: Whether the run's device is a GPU.

    Returns:
        None if they fit, or if there are none.
    """
    if not memory.residuals or memory.fits(memory.offload, room):
        return None
    where = "host memory" if memory.residuals_on_host else "device memory"
    return (
        f"refresh_every stores {memory.residuals:.0f} GiB of residuals in {where}, and there is "
        f"no room for them: the run needs about {memory.peak:.0f} GiB on the device and "
        f"{memory.host:.0f} GiB on the host. {_residual_remedy(memory, without, room, on_gpu)}"
    )


def _residual_remedy(
    memory: MemoryEstimate, without: MemoryEstimate, room: Room, on_gpu: bool
) -> str:
    """The fastest way that fits with residuals, else what else helps."""
    places: tuple[ResidualPlace, ...] = ("device", "host") if on_gpu else ()
    num_bytes = round(memory.residuals * _GIB)
    for offload in _FASTEST_FIRST:
        for place in places:
            found = with_residuals(without, num_bytes, place, room, on_gpu)
            if offload in found.peaks and found.fits(offload, room):
                return f"offload={offload!r} with residual={place!r} fits."
    return (
        "Without refresh_every it fits, for example with density=0.2, token_order='hilbert', "
        "compensation='first-order' and mask_every=4; or make the video smaller."
    )


def settle_offload(options: LoadOptions, video: VideoSettings) -> LoadOptions:
    """The options with the best offload for the video on this machine, unless one was given.

    Raises:
        ValueError, UnsupportedModelError, PipelineLoadError: As in `read_model_shape`.
    """
    if options.offload is not None or options.resolved_device.type != "cuda":
        return options
    shape = read_model_shape(find_model(options.model))
    memory = estimate_memory(shape, video, options, find_room(options))
    return replace(options, offload=memory.offload)


def describe_shortage(
    shape: ModelShape, video: VideoSettings, options: LoadOptions, room: Room
) -> str | None:
    """Why a run cannot fit, and what would fit; None if it may fit."""
    memory = estimate_memory(shape, video, options, room)
    if memory.fits(memory.offload, room):
        return None
    short = []
    if room.gpu is not None and memory.peak > room.gpu:
        short.append(f"About {memory.peak:.0f} GiB are needed and the GPU has {room.gpu:.0f}")
    if room.host is not None and memory.host > room.host:
        short.append(
            f"About {memory.host:.0f} GiB of host memory are needed and "
            f"this machine has {room.host:.0f} free"
        )
    return f"{'; '.join(short)}. {_remedy(shape, video, options, room)}"


def _choose(memory: MemoryEstimate, room: Room) -> MemoryEstimate:
    """The estimate with the fastest offload that fits."""
    if room.gpu is None:
        reason = "the default; with --gpu-memory, the fastest that fits is chosen"
        return replace(memory, offload_reason=reason)
    fitting = [name for name in _FASTEST_FIRST if memory.fits(name, room)]
    offload = fitting[0] if fitting else _FASTEST_FIRST[-1]
    free = f"{room.gpu:.0f} GiB of GPU memory"
    free += "" if room.host is None else f" and {room.host:.0f} GiB of host memory"
    reason = f"the fastest that fits {free}" if fitting else f"although nothing fits {free}"
    return replace(
        memory,
        offload=offload,
        offload_reason=reason,
        peak=memory.peaks[offload],
        host=memory.hosts[offload],
    )


def _decoding_gib(
    shape: ModelShape, video: VideoSettings, options: LoadOptions, size: int
) -> float:
    """The memory of the VAE in addition to its weights."""
    values = tile = video.num_frames * video.height * video.width
    if options.resolved_vae_tiling:
        tile = min(video.num_frames, _TILE_FRAMES)
        tile *= min(video.height, _TILE_SIDE) * min(video.width, _TILE_SIDE)
    # Each GPU that shares a video holds all decoded tiles at once.
    copies = _FRAME_COPIES + (_TILE_OVERLAP if options.num_gpus > 1 else 0)
    return (_VAE_TENSORS * shape.vae_channels * tile + copies * 3 * values) * size / _GIB


def _remedy(shape: ModelShape, video: VideoSettings, options: LoadOptions, room: Room) -> str:
    """What would fit: another offload, tiled decoding, or a smaller video."""
    memory = estimate_memory(shape, video, options, room)
    fitting = [name for name in memory.peaks if memory.fits(name, room)]
    if fitting:
        return f"Try --offload {' or '.join(fitting)}, or a smaller video."
    tiled = replace(options, vae_tiling=True)
    if not options.resolved_vae_tiling and _any_fits(shape, video, tiled, room):
        return "Try --vae-tiling, or a smaller video."
    for share in _SMALLER_SIDES:
        height, width = (
            max(SIZE_STEP, int(side * share) // SIZE_STEP * SIZE_STEP)
            for side in (video.height, video.width)
        )
        smaller = replace(video, height=height, width=width)
        frames = _most_frames(shape, smaller, options, room)
        if frames:
            fitted = estimate_memory(shape, replace(smaller, num_frames=frames), options, room)
            fitting = [name for name in fitted.peaks if fitted.fits(name, room)]
            offload = "" if memory.offload in fitting else f" and --offload {fitting[0]}"
            return f"{width}x{height} with --num-frames {frames}{offload} fits."
    return "No video fits. Use a smaller --model, such as demo, or another machine."


def _most_frames(
    shape: ModelShape, video: VideoSettings, options: LoadOptions, room: Room
) -> int | None:
    """The most frames of the video's size that fit, up to its own; None if not even one does."""

    def too_many(quarter: int) -> bool:
        shorter = replace(video, num_frames=4 * quarter + 1)
        return not _any_fits(shape, shorter, options, room)

    fitting = bisect_left(range((video.num_frames - 1) // 4 + 1), True, key=too_many)
    return 4 * (fitting - 1) + 1 if fitting else None


def _any_fits(shape: ModelShape, video: VideoSettings, options: LoadOptions, room: Room) -> bool:
    memory = estimate_memory(shape, video, options, room)
    return any(memory.fits(name, room) for name in memory.peaks)
