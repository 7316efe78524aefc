"""Reads the denoising step from a running pipeline and its scheduler."""

import weakref
from typing import Any

from xattn_video.policy.steps import SchedulerStep


class PipelineSteps:
    """The steps of the generation that a Diffusers pipeline is running.

    Another pipeline, or a loop, may run the same transformer. A pipeline that an exception stopped
    appears to be running until it runs again, but its own timestep stays the same object while
    others go on. This object does not keep the pipeline alive.
    """

    def __init__(self, pipeline: Any) -> None:
        self._pipeline = weakref.ref(pipeline)
        # The pipeline's own timestep; the one that the transformer got with it, and the
        # scheduler's step then.
        self._current: Any = None
        self._seen: tuple[float, int | None] | None = None

    def of_copy(self, memo: dict[int, Any]) -> "PipelineSteps | None":
        """The steps of the pipeline's copy; None if the deep copy of ``memo`` makes none."""
        copied = memo.get(id(self._pipeline()))
        return None if copied is None else PipelineSteps(copied)

    def count(self, timestep: float) -> int | None:
        """Number of denoising steps of the generation; None if none is running.

        Args:
            timestep: The timestep of the forward pass.
        """
        num_steps: int | None = getattr(self._running(timestep), "_num_timesteps", None)
        return num_steps

    def current(self, timestep: float) -> SchedulerStep | None:
        """The scheduler's step; None if no generation is running or the scheduler has none.

        Args:
            timestep: The timestep of the forward pass.
        """
        before = self._current
        scheduler: Any = getattr(self._running(timestep), "scheduler", None)
        if not hasattr(scheduler, "step_index"):
            return None
        index = scheduler.step_index
        if index is None:
            return SchedulerStep(None, self._current is before)
        # Video-to-video begins in the middle of the scheduler's timesteps.
        return SchedulerStep(index - (getattr(scheduler, "begin_index", None) or 0))

    def _running(self, timestep: float) -> Any:
        """The pipeline; None if it is not running a generation."""
        pipeline = self._pipeline()
        # Diffusers' pipelines set it to None before and after their denoising loop.
        current = getattr(pipeline, "_current_timestep", None)
        seen = timestep, getattr(getattr(pipeline, "scheduler", None), "step_index", None)
        if current is not self._current:
            # Comparing the objects needs no transfer from the device.
            self._current, self._seen = current, seen
        elif seen != self._seen:
            # A running pipeline would have another timestep by now; it stays stopped.
            self._seen = None
        return None if current is None or self._seen is None else pipeline
