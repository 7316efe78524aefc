"""Reads the denoising step from a running pipeline and its scheduler."""

import weakref
from typing import Any

from xattn_video.policy.steps import SchedulerStep


class PipelineSteps:
    """The steps of the generation that a Diffusers pipeline is running.

    Another pipeline may share the transformer. A pipeline that an exception stopped appears to be
    running until it runs again. This object does not keep the pipeline alive.
    """

    def __init__(self, pipeline: Any) -> None:
        self._pipeline = weakref.ref(pipeline)

    def count(self) -> int | None:
        """Number of denoising steps of the generation; None if none is running."""
        num_steps: int | None = getattr(self._running(), "_num_timesteps", None)
        return num_steps

    def current(self) -> SchedulerStep | None:
        """The scheduler's step; None if no generation is running or the scheduler has none."""
        scheduler: Any = getattr(self._running(), "scheduler", None)
        if not hasattr(scheduler, "step_index"):
            return None
        index = scheduler.step_index
        if index is None:
            return SchedulerStep(None)
        # Video-to-video begins in the middle of the scheduler's timesteps.
        return SchedulerStep(index - (getattr(scheduler, "begin_index", None) or 0))

    def _running(self) -> Any:
        """The pipeline; None if it is not running a generation."""
        pipeline = self._pipeline()
        # Diffusers' pipelines set it to None before and after their denoising loop.
        return None if getattr(pipeline, "_current_timestep", None) is None else pipeline
