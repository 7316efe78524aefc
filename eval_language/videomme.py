"""Video-MME with lmms-eval, whose models bring their own loading and videos.

python -m eval_language.videomme --run runs/videomme --model Qwen/Qwen2-VL-7B-Instruct
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from eval_language.harness_output import Tick, quiet_harness, told_answers, without_git
from eval_language.harness_run import (
    HarnessOptions,
    Prepared,
    Scorer,
    check_layers,
    harness_command,
)
from eval_language.lm_eval_tasks import needed_data, sample_scores
from xattn_video.options.command import knob

if TYPE_CHECKING:
    from xattn_video.pipelines.loading import LoadOptions

_METRIC = "videomme_perception_score"


@dataclass(frozen=True, slots=True)
class VideoOptions(HarnessOptions):
    """The options of Video-MME."""

    kind: str = knob("lmms_eval's name for the type of model.", "qwen2_vl")
    frames: int = knob("Maximum number of frames per video.", 768)


def tasks(asked: VideoOptions) -> list[str]:
    """The tasks that are asked for."""
    return (asked.tasks or "videomme,videomme_w_subtitle").split(",")


def prepare(asked: VideoOptions, load: "LoadOptions") -> Prepared:
    """Load the data sets from the hub or its cache."""
    from xattn_video.language.model_sources import DEMO

    if asked.model == DEMO:
        raise ValueError(
            "the demo language model sees no videos; use a model that does, such as "
            "Qwen/Qwen2-VL-7B-Instruct."
        )
    names = tasks(asked)
    with quiet_harness():
        with needed_data(names[0]):
            # Its loggers write to what stderr is when they are imported.
            from lmms_eval.tasks import TaskManager, get_task_dict
        manager = TaskManager()
        for name in names:
            with needed_data(name), _last_try():
                get_task_dict([name], manager)

    @quiet_harness()
    def loaded() -> tuple[Any, Any]:
        from lmms_eval.models import get_model

        options = {"pretrained": asked.model, "max_num_frames": asked.frames}
        device = str(load.resolved_device)
        lm = get_model(asked.kind)(**options, device=device, device_map=device)
        # The harness deletes the model after each evaluation, and the next setting needs it.
        lm.clean = lambda: None
        # Before, only the harness knows how to read the model.
        text_config = lm.model.config.get_text_config(decoder=True)
        check_layers(asked, text_config, type(lm.model).__name__)
        return lm, lm.model

    return Prepared({name: (name, _scorer(name, asked.samples)) for name in names}, loaded)


@contextmanager
def _last_try() -> Iterator[None]:
    """Raise the error of the last try where the harness tried a download several times."""
    try:
        yield
    except Exception as error:
        # Tenacity's, a package that only this harness needs.
        if hasattr(error, "last_attempt"):
            error.last_attempt.result()
        raise


def _scorer(task: str, samples: int) -> Scorer:
    def score(lm: Any, tick: Tick) -> dict[str, float]:
        with told_answers(lm.model, tick):
            from lmms_eval import evaluator

            with without_git(evaluator):
                results = evaluator.simple_evaluate(
                    lm, tasks=[task], limit=samples, bootstrap_iters=0
                )
        return sample_scores(results, lambda one: one[_METRIC]["score"])

    return score


app = harness_command("Video-MME", "lmms-eval>=0.7.3", VideoOptions, tasks, prepare)

if __name__ == "__main__":
    app()
