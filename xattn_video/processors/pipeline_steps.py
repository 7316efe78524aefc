"""What a running pipeline knows of its denoising steps."""

import weakref
from typing import Any

from xattn_video.policy.steps import SchedulerStep


class PipelineSteps:
    """Steps of the generation that a Diffusers pipeline is running.

    Another pipeline may share its transformer. One that an exception stopped looks as if it ran
    on until it runs again. The pipeline is not kept alive.
    """

    def __init__(self, pipeline: Any) -> None:
        self._pipeline = weakref.ref(pipeline)

    def count(self) -> int | None:
        """Denoising steps of the generation; None where none runs."""
        num_steps: int | None = getattr(self._running(), "_num_timesteps", None)
        return num_steps

    def current(self) -> SchedulerStep | None:
        """What the pipeline's scheduler says; None where none runs or the scheduler is silent."""
        scheduler: Any = getattr(self._running(), "scheduler", None)
        if not hasattr(scheduler, "step_index"):
            return None
        index = scheduler.step_index
        if index is None:
            return SchedulerStep(None)
        # Video-to-video begins in the middle of the scheduler's timesteps.
        return SchedulerStep(index - (getattr(scheduler, "begin_index", None) or 0))

    def _running(self) -> Any:
        """The pipeline; None where it runs no generation."""
        pipeline = self._pipeline()
        # Diffusers' pipelines set it to None before and after their denoising loop.
        return None if getattr(pipeline, "_current_timestep", None) is None else pipeline
