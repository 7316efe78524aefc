"""Loads a HunyuanVideo pipeline as Diffusers' documentation advises for memory."""

import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

import torch

from xattn_video.errors import BackendUnavailableError
from xattn_video.pipelines.model_files import check_model_files
from xattn_video.pipelines.source import DEMO, HUNYUAN_VIDEO, check_supported, find_model

if TYPE_CHECKING:
    from diffusers import HunyuanVideoPipeline

Offload = Literal["none", "model", "sequential", "group"]

DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}


@dataclass(frozen=True, slots=True)
class LoadOptions:
    """How to load a pipeline. None means a default that depends on the model and the device.

    Attributes:
        model: ``"demo"``, a folder written by ``save_pretrained``, or a hub ID.
        dtype: Dtype of the transformer. On CUDA the text encoders and the VAE are float16 with a
            bfloat16 transformer, as Diffusers advises; elsewhere all parts share it.
        device: None means a CUDA device if there is one, else the CPU.
        offload: Which parts wait in host memory: whole models, single layers one after the other
            (slowest, least memory), or groups of layers with overlapped transfers. If None, whole
            models on CUDA, and nothing elsewhere or for the demo model; `memory.settle_offload`
            chooses by the free memory.
        vae_tiling: Decode the video in tiles. If None, on except for the demo model.
        attention_backend: A Diffusers attention backend for the dense steps.
        device_elsewhere: The device may be in another machine: plan with these options only.
        processes: Processes on this machine that load the model and share its host memory.
        num_gpus: GPUs that share the tokens of each video.
        gpu_memory: Memory in GiB of the GPU to plan for; the device is then a GPU unless one is
            given. If None, the memory that is free on the device.
    """

    model: str = HUNYUAN_VIDEO
    dtype: torch.dtype | None = None
    device: str | None = None
    offload: Offload | None = None
    vae_tiling: bool | None = None
    attention_backend: str | None = None
    device_elsewhere: bool = False
    gpu_memory: float | None = None
    processes: int = 1
    num_gpus: int = 1

    def __post_init__(self) -> None:
        if self.dtype is not None and self.dtype not in DTYPES.values():
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {self.dtype}.")
        if self.offload is not None and self.offload not in get_args(Offload):
            raise ValueError(
                f"offload must be one of {', '.join(get_args(Offload))}, got {self.offload!r}."
            )
        if self.num_gpus < 1:
            raise ValueError(f"num_gpus must be at least 1, got {self.num_gpus}; use 1.")
        device = self.resolved_device
        if self.gpu_memory is not None and not (device.type == "cuda" and self.gpu_memory > 0):
            raise ValueError(
                f"gpu_memory must be above 0 GiB on a CUDA device, got {self.gpu_memory} on "
                f"{str(device)!r}; use 24, or omit it."
            )
        if not self.device_elsewhere and not self.device_is_here:
            found = (
                f"this machine has {torch.cuda.device_count()} CUDA device(s)."
                if torch.cuda.is_available()
                else "torch finds no CUDA device; use cpu."
            )
            raise ValueError(f"device {str(device)!r} does not exist: {found}")
        if device.type == "cpu" and self.resolved_offload != "none":
            raise ValueError(
                f"offload={self.offload!r} needs a GPU, got device 'cpu'; use offload none."
            )

    @property
    def resolved_device(self) -> torch.device:
        """The device that runs the model."""
        if self.device is None:
            on_gpu = self.gpu_memory is not None or torch.cuda.is_available()
            return torch.device("cuda" if on_gpu else "cpu")
        device: torch.device | None = None
        with contextlib.suppress(RuntimeError):
            device = torch.device(self.device)
        # Other device types exist, but this package was never run on them.
        if device is None or (device.type != "cuda" and str(device) != "cpu"):
            raise ValueError(
                f"device must be cpu, cuda or cuda:N, got {self.device!r}; use one of these."
            )
        return device

    @property
    def device_is_here(self) -> bool:
        """Whether this machine has the device."""
        device = self.resolved_device
        return device.type != "cuda" or (device.index or 0) < torch.cuda.device_count()

    @property
    def resolved_dtype(self) -> torch.dtype:
        """The transformer's dtype."""
        if self.dtype is not None:
            return self.dtype
        if self.model == DEMO:
            from xattn_video.pipelines.demo import default_dtype

            return default_dtype(self.resolved_device)
        return torch.bfloat16 if self.resolved_device.type == "cuda" else torch.float32

    @property
    def resolved_offload(self) -> Offload:
        """The offload that will be used."""
        if self.offload is not None:
            return self.offload
        whole_models = self.resolved_device.type == "cuda" and self.model != DEMO
        return "model" if whole_models else "none"

    @property
    def resolved_vae_tiling(self) -> bool:
        """Whether the video is decoded in tiles."""
        return self.model != DEMO if self.vae_tiling is None else self.vae_tiling


def load_pipeline(options: LoadOptions) -> "HunyuanVideoPipeline":
    """Load the pipeline, place it on its device and configure it.

    Raises:
        ValueError, BackendUnavailableError: As in `check_loading`.
        UnsupportedModelError: The pipeline is not HunyuanVideo's; found before weights are read.
        PipelineLoadError: The hub has no such model, or cannot be reached.
    """
    check_loading(options)
    check_supported(find_model(options.model))
    pipe = _read_pipeline(options)
    _place(pipe, options)
    if options.resolved_vae_tiling:
        pipe.vae.enable_tiling()
    if options.attention_backend is not None:
        # This also sets the active backend of the process, which later processors use.
        pipe.transformer.set_attention_backend(options.attention_backend)
    return pipe


def check_loading(options: LoadOptions) -> None:
    """Check what would otherwise fail only after the weights are loaded or the video decoded.

    Raises:
        ValueError: The demo model cannot use the dtype, the attention backend is unknown, the
            model does not exist, or files of its folder are damaged.
        BackendUnavailableError: The attention backend cannot be used here.
        UnsupportedModelError: The folder's pipeline is not HunyuanVideo's.
    """
    source = find_model(options.model)
    if source.folder is not None:
        check_supported(source)
        check_model_files(source.folder)
    if options.model == DEMO and options.dtype == torch.float16:
        raise ValueError(
            "dtype float16 cannot represent the values of the demo model's VAE; "
            "use bfloat16 or float32."
        )
    if options.attention_backend is not None:
        _check_attention_backend(options.attention_backend)


def _check_attention_backend(name: str) -> None:
    """Check that Diffusers can use the backend ``name``.

    Raises:
        ValueError: No backend has this name.
        BackendUnavailableError: Its package is missing or too old.
    """
    from diffusers.models.attention_dispatch import (
        AttentionBackendName,
        _check_attention_backend_requirements,
    )

    known = sorted(member.value for member in AttentionBackendName)
    if name.lower() not in known:
        raise ValueError(
            f"unknown attention backend {name!r} for the dense steps; "
            f"Diffusers has {', '.join(known)}."
        )
    try:
        _check_attention_backend_requirements(AttentionBackendName(name.lower()))
    except RuntimeError as error:
        raise BackendUnavailableError(name, [str(error)]) from None


def _read_pipeline(options: LoadOptions) -> "HunyuanVideoPipeline":
    """The pipeline, on the host or already on its device."""
    from diffusers import HunyuanVideoPipeline

    dtype = options.resolved_dtype
    if options.model == DEMO:
        from xattn_video.pipelines.demo import load_demo_pipeline

        return load_demo_pipeline(dtype, "cpu")
    others = dtype
    if options.resolved_device.type == "cuda" and dtype == torch.bfloat16:
        others = torch.float16
    folder = find_model(options.model).folder
    return HunyuanVideoPipeline.from_pretrained(
        options.model if folder is None else folder,
        dtype={"transformer": dtype, "default": others},
    )


def _place(pipe: "HunyuanVideoPipeline", options: LoadOptions) -> None:
    """Move the parts to their devices, or set up offloading."""
    device = options.resolved_device
    match options.resolved_offload:
        case "none":
            pipe.to(device)
        case "model":
            pipe.enable_model_cpu_offload(device=device)
        case "sequential":
            pipe.enable_sequential_cpu_offload(device=device)
        case "group":
            pipe.enable_group_offload(
                onload_device=device, offload_type="leaf_level", use_stream=True
            )
