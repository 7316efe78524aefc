"""Checks of a run before the weights are loaded."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from xattn_video.pipelines.request import GenerationRequest
from xattn_video.pipelines.source import DEMO

if TYPE_CHECKING:
    from xattn_video.pipelines.loading import LoadOptions

# Of a square frame.
_LEAST_DEMO_SIDE = 256


def check_runs(
    load: "LoadOptions",
    requests: Sequence[GenerationRequest],
    force: bool = False,
    prompts: Sequence[str] = (),
) -> list[str]:
    """Check for everything that would fail; return warnings of what would have no effect.

    Args:
        load: How the model will be loaded.
        requests: One request for each kind of run.
        force: Warn instead of raising if the run cannot fit in memory.
        prompts: All prompts; the demo model understands few.

    Raises:
        ValueError: The run cannot fit in memory, the scoring precision is not available, the
            schedule does not fit the model, or the model cannot be used.
        UnsupportedModelError, PipelineLoadError: The model cannot be used.
        BackendUnavailableError: A backend cannot run the model's heads, or the dense steps, here.
    """
    from xattn_video.pipelines.loading import check_loading
    from xattn_video.pipelines.model_shape import read_model_shape
    from xattn_video.pipelines.run_plan import plan_run
    from xattn_video.pipelines.source import find_model

    check_loading(load)
    shape = read_model_shape(find_model(load.model))
    warnings: list[str] = []
    for request in requests:
        sparse = request.sparse
        if sparse is not None:
            sparse.backend_for(load.resolved_device, load.resolved_dtype, shape.head_dim)
        plan = plan_run(shape, request.video, sparse, load)
        if plan.shortage is not None and not force:
            raise ValueError(f"{plan.shortage} --force runs it anyway.")
        warnings += plan.warnings
    if load.model == DEMO:
        warnings += _small_videos(requests) + unknown_words(prompts)
    return list(dict.fromkeys(warnings))


def _small_videos(requests: Sequence[GenerationRequest]) -> list[str]:
    """A warning if the demo model was not trained on such small frames."""
    least = min(request.video.height * request.video.width for request in requests)
    if least >= _LEAST_DEMO_SIDE**2:
        return []
    return [
        f"the demo model was trained on {_LEAST_DEMO_SIDE}x{_LEAST_DEMO_SIDE} pixels and more; "
        "smaller videos may not show what the prompt says."
    ]


def unknown_words(prompts: Sequence[str]) -> list[str]:
    """A warning for the first prompt that the demo model's grammar does not cover."""
    from xattn_video.pipelines.demo import parse_prompt

    for prompt in prompts:
        try:
            parse_prompt(prompt)
        except ValueError as error:
            return [str(error)]
    return []
