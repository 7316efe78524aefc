"""Generates videos with every method, and compares each with the dense video."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeAlias

import torch

from xattn_video.measure.clips import Clip
from xattn_video.measure.frames import relative_error
from xattn_video.measure.methods import DENSE, Method
from xattn_video.measure.similarity import Scorer, Similarity
from xattn_video.pipelines.expected_work import ExpectedWork
from xattn_video.pipelines.generation import GenerationResult, StepRecord, generate_together
from xattn_video.pipelines.request import GenerationRequest
from xattn_video.processors.observers import KeptMass

if TYPE_CHECKING:
    from diffusers import HunyuanVideoPipeline

OnStep: TypeAlias = Callable[[StepRecord], None]
Progress: TypeAlias = Callable[[str, Mapping[str, float], int], AbstractContextManager[OnStep]]
Attributes: TypeAlias = dict[str, list[bool]]


@dataclass(frozen=True, slots=True)
class Measurement:
    """The measurements of one video.

    Attributes:
        method, prompt, seed: How the video was made.
        seconds: Seconds from the prompt to the frames; an equal share for videos made together.
        dense_step_seconds, sparse_step_seconds: Medians, likewise; None without such steps.
        peak_memory_gib: Peak of the CUDA device, for all videos made together; None elsewhere.
        density: Kept over valid blocks of sparse layer runs, refreshes counted as 1, over all
            videos made together; None if nothing ran sparse.
        kept_mass: True softmax mass of the kept blocks; None if it was not measured.
        backends: The backends of the sparse layers.
        similarity: Similarity to the dense video; None for the dense video itself.
        latent_error: Error of the denoised latents, relative to the dense latents.
        attributes: Whether the clip shows what its prompt says; only for the demo model.
    """

    method: Method
    prompt: str
    seed: int
    seconds: float
    dense_step_seconds: float | None
    sparse_step_seconds: float | None
    peak_memory_gib: float | None
    density: float | None
    kept_mass: float | None
    backends: tuple[str, ...]
    similarity: Similarity | None
    latent_error: float | None
    attributes: Attributes | None


@dataclass(frozen=True, slots=True)
class Outcome:
    """A measurement with its video, the dense video, and the generation."""

    measurement: Measurement
    clip: Clip
    reference: Clip
    result: GenerationResult


@dataclass(frozen=True, slots=True)
class Comparison:
    """What all videos of a comparison share.

    Attributes:
        pipe: The loaded pipeline, on its device.
        methods: The methods without `DENSE`, which always comes first.
        scorer: Measures the videos.
        fps: Frames per second of the videos.
        judge: Function that checks whether the frames show what the prompt says; None if there
            is no such check.
    """

    pipe: "HunyuanVideoPipeline"
    methods: Sequence[Method]
    scorer: Scorer
    fps: int
    judge: Callable[[str, Clip], Attributes | None] | None = None

    def run(
        self,
        requests: Sequence[GenerationRequest],
        progress: Progress,
        *,
        measure_kept_mass: bool = False,
    ) -> Iterator[tuple[Outcome, ...]]:
        """Yield the outcomes of each method, one for each request, dense videos first.

        Args:
            requests: The requests to generate together; their sparse settings do not matter.
            progress: Function (label, units of work, number of videos) that opens a display for
                the steps.
            measure_kept_mass: Also measure kept mass, in another generation for each method.
        """
        references: tuple[Outcome, ...] = ()
        for method in (DENSE, *self.methods):
            requests = [replace(request, sparse=method.sparse) for request in requests]
            timed, again = self._work(requests, measure_kept_mass)
            with progress(method.label, timed, len(requests)) as on_step:
                results = generate_together(self.pipe, requests, on_step)
            masses = None
            if again is not None:
                with progress(f"{method.label}, kept mass", again, len(requests)) as on_step:
                    masses = generate_for_kept_mass(self.pipe, requests, on_step)
            outcomes = self._measure(method, requests, results, references, masses)
            references = references or outcomes
            yield outcomes

    def expected(
        self, requests: Sequence[GenerationRequest], *, measure_kept_mass: bool = False
    ) -> Iterator[dict[str, float]]:
        """The units of work of each generation that `run` will make for these requests."""
        for method in (DENSE, *self.methods):
            batch = [replace(request, sparse=method.sparse) for request in requests]
            yield from filter(None, self._work(batch, measure_kept_mass))

    def _work(
        self, requests: Sequence[GenerationRequest], measure_kept_mass: bool
    ) -> tuple[dict[str, float], dict[str, float] | None]:
        """Units of work of a method's timed generation, and of the one for kept mass or None.

        The last of them includes measuring and writing.
        """
        work, first, videos = ExpectedWork.of(self.pipe), requests[0], len(requests)
        timed = work.of_run(first, videos)
        if first.sparse is None:
            return timed | {"writing": videos}, None
        written = {"writing and measuring": float(videos)}
        if not measure_kept_mass:
            return timed | written, None
        return timed, work.of_run(first, videos, kept_mass=True) | written

    def warm_up(self, requests: Sequence[GenerationRequest], progress: Progress) -> None:
        """Run one dense step, and one sparse step for each stride, before the first timed video.

        This does everything that happens only at first use, such as compiling kernels.
        """
        one_step = replace(requests[0].video, num_inference_steps=1)
        sparse = [method.sparse for method in self.methods if method.sparse is not None]
        strides = {settings.stride: settings for settings in sparse}
        for settings in (None, *strides.values()):
            if settings is not None:
                settings = replace(settings, warmup_steps=0, cooldown_steps=0, refresh_every=None)
            with progress("first use, not timed", {}, len(requests)) as on_step:
                generate_together(
                    self.pipe,
                    [replace(request, sparse=settings, video=one_step) for request in requests],
                    on_step,
                )

    def _measure(
        self,
        method: Method,
        requests: Sequence[GenerationRequest],
        results: Sequence[GenerationResult],
        references: Sequence[Outcome],
        masses: list[float] | None,
    ) -> tuple[Outcome, ...]:
        clips = [Clip(result.frames, self.fps) for result in results]
        attributes = self._judge([request.prompt for request in requests], clips)
        on_cuda = self.pipe._execution_device.type == "cuda"
        outcomes = []
        for number, (request, result, clip) in enumerate(
            zip(requests, results, clips, strict=True)
        ):
            reference = references[number] if references else None
            similarity = latent_error = None
            if reference is not None:
                similarity = self.scorer.score(reference.clip, clip)
                latent_error = relative_error(reference.result.latents, result.latents)
            measurement = Measurement(
                method=method,
                prompt=request.prompt,
                seed=request.seed,
                seconds=result.seconds,
                dense_step_seconds=result.seconds_per_dense_step,
                sparse_step_seconds=result.seconds_per_sparse_step,
                # On the host only the largest size of the process so far is known, which does
                # not belong to one video.
                peak_memory_gib=result.peak_memory_gib if on_cuda else None,
                density=None if result.report is None else result.report.budget,
                kept_mass=None if masses is None else masses[number],
                backends=() if result.report is None else result.report.backends,
                similarity=similarity,
                latent_error=latent_error,
                attributes=attributes[number],
            )
            outcomes.append(
                Outcome(measurement, clip, reference.clip if reference else clip, result)
            )
        return tuple(outcomes)

    def _judge(self, prompts: list[str], clips: list[Clip]) -> list[Attributes | None]:
        if self.judge is None:
            return [None] * len(clips)
        # In parallel, because many small operations leave most CPU cores idle.
        with ThreadPoolExecutor() as pool:
            return list(pool.map(self.judge, prompts, clips))


def generate_for_kept_mass(
    pipe: "HunyuanVideoPipeline",
    requests: Sequence[GenerationRequest],
    on_step: OnStep | None = None,
) -> list[float] | None:
    """Generate again and return the mean kept mass of each video; None if no layer was sparse.

    Args:
        pipe: The loaded pipeline; its attention processors are restored afterwards.
        requests: The requests, with sparse settings.
        on_step: Called after every denoising step.
    """
    kept_mass = KeptMass()
    generate_together(pipe, requests, on_step, (kept_mass,))
    return kept_mass.means


def judge_demo_clip(prompt: str, clip: Clip) -> Attributes | None:
    """The demo model's own checks; None for a prompt outside its grammar."""
    from xattn_video.measure.demo_checks import score_clip
    from xattn_video.pipelines.demo import parse_prompt

    try:
        scene = parse_prompt(prompt)
    except ValueError:
        return None
    return score_clip(torch.from_numpy(clip.frames).permute(0, 3, 1, 2), scene)
