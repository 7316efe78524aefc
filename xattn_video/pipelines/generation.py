"""Generates videos and records their times, memory use and attention."""

import statistics
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from xattn_video.pipelines.prompt_length import PromptTokens, count_prompt_tokens
from xattn_video.pipelines.request import GenerationRequest
from xattn_video.policy.report import SparsityReport
from xattn_video.policy.settings import SparseSettings
from xattn_video.processors import XAttnProcessor, enable_on_transformer
from xattn_video.processors.context_parallel import is_split
from xattn_video.processors.guidance_split import guidance_split
from xattn_video.processors.recorder import Observer
from xattn_video.processors.tile_split import tile_split

if TYPE_CHECKING:
    from diffusers import HunyuanVideoPipeline

_DAMAGED = "float32 can represent all values, so check the model's files and the guidance scales"
_STEP_REMEDIES = {
    torch.float16: "load the model in bfloat16 or float32",
    torch.bfloat16: "load the model in float32",
    torch.float32: _DAMAGED,
}


@dataclass(frozen=True, slots=True)
class StepRecord:
    """One finished denoising step."""

    index: int
    total: int
    seconds: float
    sparse: bool
    density: float | None
    """Kept over valid blocks of all layers together; None for a dense step."""
    refreshed: bool = False
    """Whether layers computed both the dense and the sparse output."""

    @property
    def kind(self) -> Literal["dense", "sparse", "refresh"]:
        """The kind of step; times are compared by kind."""
        if self.refreshed:
            return "refresh"
        return "sparse" if self.sparse else "dense"


@dataclass(frozen=True, slots=True)
class GenerationResult:
    """A video, with its times, memory and report.

    Attributes:
        frames: uint8 `[T, H, W, 3]`, RGB.
        steps: Every denoising step.
        seconds: Seconds from the prompt to the frames.
        peak_memory_gib: Largest allocation on the CUDA device during this generation; elsewhere
            the largest resident size of the process so far, or None if the system does not tell.
        report: What attention did; None if dense attention throughout was requested.
        latents: float32 `[C, T, H, W]` on the host, the input of the VAE's decoder.
        prompt_tokens: Token counts of the prompt, and of the negative prompt if there is one.
        text_seconds: Seconds before the first step, in which the text is encoded.
    """

    frames: NDArray[np.uint8]
    steps: tuple[StepRecord, ...]
    seconds: float
    peak_memory_gib: float | None
    report: SparsityReport | None
    latents: Tensor
    prompt_tokens: tuple[PromptTokens, ...] = ()
    text_seconds: float = 0.0

    @property
    def decoding_seconds(self) -> float:
        """Seconds after the last step, in which the video is decoded and copied to the host."""
        return self.seconds - self.text_seconds - self.dense_seconds - self.sparse_seconds

    @property
    def dense_seconds(self) -> float:
        """Seconds spent in dense steps."""
        return sum(step.seconds for step in self.steps if not step.sparse)

    @property
    def sparse_seconds(self) -> float:
        """Seconds spent in sparse steps."""
        return sum(step.seconds for step in self.steps if step.sparse)

    @property
    def seconds_per_dense_step(self) -> float | None:
        """The median, so that a first step that compiles or moves weights has no effect."""
        return self._median_seconds("dense")

    @property
    def seconds_per_sparse_step(self) -> float | None:
        """The median over the sparse steps that refresh nothing."""
        return self._median_seconds("sparse")

    @property
    def seconds_per_refresh_step(self) -> float | None:
        """The median over the steps that refresh."""
        return self._median_seconds("refresh")

    @property
    def estimated_seconds_saved(self) -> float | None:
        """Seconds saved against dense steps only, from medians; None without both kinds.

        The first step, which may compile or move weights, says nothing about other dense steps.
        """
        warm = [step.seconds for step in self.steps[1:] if step.kind == "dense"]
        sparse = self.seconds_per_sparse_step
        if not warm or sparse is None:
            return None
        dense = statistics.median(warm)
        saved = (dense - sparse) * sum(step.kind == "sparse" for step in self.steps)
        refresh = self.seconds_per_refresh_step
        if refresh is not None:
            saved += (dense - refresh) * sum(step.refreshed for step in self.steps)
        return saved

    def _median_seconds(self, kind: str) -> float | None:
        seconds = [step.seconds for step in self.steps if step.kind == kind]
        return statistics.median(seconds) if seconds else None


def generate(
    pipe: "HunyuanVideoPipeline",
    request: GenerationRequest,
    on_step: Callable[[StepRecord], None] | None = None,
) -> GenerationResult:
    """Generate one video.

    Args:
        pipe: The loaded pipeline; its attention processors are restored afterwards.
        request: What to generate.
        on_step: Called after every denoising step.
    """
    return generate_together(pipe, [request], on_step)[0]


def generate_together(
    pipe: "HunyuanVideoPipeline",
    requests: Sequence[GenerationRequest],
    on_step: Callable[[StepRecord], None] | None = None,
    observers: Sequence[Observer] = (),
) -> tuple[GenerationResult, ...]:
    """Generate several videos in one call of the pipeline.

    Ranks that share a video (`enable_context_parallel`) must all call this with the same
    requests.

    Args:
        pipe: The loaded pipeline; its attention processors are restored afterwards.
        requests: What to generate; they may differ only in prompt and seed.
        on_step: Called after every denoising step of all videos.
        observers: Called after the attention of every layer, if the requests have sparse settings.

    Returns:
        One result for each video, with an equal share of the seconds, and with the memory and
        report of the whole call.

    Raises:
        ValueError: The requests cannot share a call.
    """
    _check_shared_settings(requests)
    first = requests[0]
    device = pipe._execution_device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    start = time.perf_counter()
    with _attention(pipe, first.sparse) as handle, guidance_split(pipe.transformer) as guidance:
        processor = handle.processor if handle and first.sparse else None
        if processor is not None:
            processor.observers.extend(observers)
        recorder = _StepRecorder(pipe, first.video.num_inference_steps, processor, on_step)
        frames = _frames(pipe, requests, recorder)
        report = processor.report() if processor else None
        if report is not None and guidance is not None:
            report = guidance.whole(report)
            recorder.correct_densities(report)
    seconds = (time.perf_counter() - start) / len(requests)
    text_seconds = (recorder.began - start) / len(requests)
    steps = tuple(replace(step, seconds=step.seconds / len(requests)) for step in recorder.steps)
    assert recorder.latents is not None
    latents = recorder.latents.float().cpu()
    memory = _peak_memory_gib(device)
    return tuple(
        GenerationResult(
            clip,
            steps,
            seconds,
            memory,
            report,
            latent,
            count_prompt_tokens(pipe, request),
            text_seconds,
        )
        for clip, latent, request in zip(frames, latents, requests, strict=True)
    )


def _frames(
    pipe: "HunyuanVideoPipeline", requests: Sequence[GenerationRequest], recorder: "_StepRecorder"
) -> list[NDArray[np.uint8]]:
    """The videos of one call, uint8 `[T, H, W, 3]` each."""
    # Denoising begins when the transformer is first called, after the text is encoded.
    hook = pipe.transformer.register_forward_pre_hook(recorder.forward_begins)
    try:
        with tile_split(pipe.vae):
            videos = pipe(
                **_pipeline_arguments(requests), callback_on_step_end=recorder.step_ends
            ).frames
        return [_to_bytes(video, pipe.vae.dtype) for video in videos]
    finally:
        hook.remove()


class _StepRecorder:
    """Times every step, and asks the processor whether it was dense or sparse."""

    def __init__(
        self,
        pipe: "HunyuanVideoPipeline",
        total: int,
        processor: XAttnProcessor | None,
        on_step: Callable[[StepRecord], None] | None,
    ) -> None:
        self.steps: list[StepRecord] = []
        self.latents: Tensor | None = None
        self.began = 0.0
        self._device = pipe._execution_device
        self._dtype = pipe.transformer.dtype
        self._total = total
        self._processor = processor
        self._on_step = on_step
        self._last_end: float | None = None

    def forward_begins(self, module: torch.nn.Module, args: tuple[Any, ...]) -> None:
        """A forward pre-hook: the first forward pass begins the first step."""
        if self._last_end is None:
            self.began = self._last_end = self._now()

    def step_ends(
        self, pipe: object, index: int, timestep: object, tensors: dict[str, Any]
    ) -> dict[str, Any]:
        """Diffusers' `callback_on_step_end`.

        Raises:
            RuntimeError: The latents are not finite; further steps could not repair them.
        """
        now = self._now()
        if not bool(tensors["latents"].isfinite().all()):
            raise RuntimeError(
                f"step {index + 1} of {self._total} produced non-finite values, "
                f"computed in {_name(self._dtype)}; {_STEP_REMEDIES[self._dtype]}."
            )
        seconds = now - (self._last_end or now)
        self.latents = tensors["latents"]
        density, refreshed = None, False
        if self._processor is not None:
            report = self._processor.report()
            density, refreshed = report.step_density(index), index in report.refresh_steps
        sparse = density is not None
        self.steps.append(StepRecord(index, self._total, seconds, sparse, density, refreshed))
        if self._on_step is not None:
            self._on_step(self.steps[-1])
        # The time of reading and showing the results belongs to no step.
        self._last_end = self._now()
        return {}

    def correct_densities(self, report: SparsityReport) -> None:
        """Replace the densities by those of a report that covers all ranks."""
        self.steps = [
            replace(step, density=report.step_density(step.index)) for step in self.steps
        ]

    def _now(self) -> float:
        """The time after the device has finished all its work."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()


def _attention(
    pipe: "HunyuanVideoPipeline", settings: SparseSettings | None
) -> AbstractContextManager[Any]:
    """A context with sparse attention, or without changes if none is needed."""
    if settings is None and not is_split(pipe.transformer):
        return nullcontext()
    # Diffusers' own processor cannot split attention over ranks.
    return enable_on_transformer(pipe, settings or SparseSettings(threshold=1.0))


def _check_shared_settings(requests: Sequence[GenerationRequest]) -> None:
    if not requests:
        raise ValueError("there is no request; give at least one.")
    different = [
        field.name
        for field in fields(GenerationRequest)
        if field.name not in ("prompt", "seed")
        and any(getattr(r, field.name) != getattr(requests[0], field.name) for r in requests)
    ]
    if different:
        raise ValueError(
            "videos of one call may differ only in prompt and seed, "
            f"got different {', '.join(different)}; generate them one after another."
        )


def _pipeline_arguments(requests: Sequence[GenerationRequest]) -> dict[str, Any]:
    first = requests[0]
    return {
        "prompt": [request.prompt for request in requests],
        # With None the pipeline would silently omit classifier-free guidance.
        "negative_prompt": [first.negative_prompt or ""] * len(requests),
        "height": first.video.height,
        "width": first.video.width,
        "num_frames": first.video.num_frames,
        "num_inference_steps": first.video.num_inference_steps,
        "guidance_scale": first.video.guidance_scale,
        "true_cfg_scale": first.video.true_cfg_scale,
        "generator": [torch.Generator("cpu").manual_seed(request.seed) for request in requests],
        "output_type": "pt",
    }


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _to_bytes(video: Tensor, dtype: torch.dtype) -> NDArray[np.uint8]:
    """Turn frames `[T, 3, H, W]` from 0 to 1 into bytes `[T, H, W, 3]`; raises on NaN."""
    if not all(bool(frame.isfinite().all()) for frame in video):
        # On a GPU a bfloat16 transformer has a float16 VAE; float32 changes both.
        remedy = _DAMAGED if dtype == torch.float32 else "load the model in float32"
        raise RuntimeError(
            f"the video, decoded in {_name(dtype)}, has non-finite values; {remedy}."
        )
    num_frames, channels, height, width = video.shape
    frames = torch.empty(num_frames, height, width, channels, dtype=torch.uint8)
    # Frame by frame, because a GPU that holds the model may lack room for the video in float32.
    for frame, place in zip(video, frames, strict=True):
        levels = frame.permute(1, 2, 0).float().mul_(255).round_()
        place.copy_(levels.to(torch.uint8).contiguous())
    return frames.numpy()


def _peak_memory_gib(device: torch.device) -> float | None:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    if sys.platform == "win32":
        return None
    import resource

    # The system reports bytes on macOS and KiB elsewhere.
    unit = 1 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
