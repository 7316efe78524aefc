"""Tasks of lm-evaluation-harness: loads their data, and scores a model on them."""

import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from eval_language.harness_output import Tick, quiet_harness, told_answers, without_git
from eval_language.harness_run import Scorer
from xattn_video.errors import MissingPackageError

_OWN_TASKS = Path(__file__).parent / "tasks"


def task_manager(metadata: dict[str, Any]) -> Any:
    """The harness's index of tasks, which takes seconds to build."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=str(_OWN_TASKS), metadata=metadata)


def check_tasks(names: Iterable[str], manager: Any) -> None:
    """Raise ValueError if the harness lacks a task, before any has generated its prompts."""
    for name in names:
        if name not in manager.all_subtasks:
            raise ValueError(
                f"lm_eval has no task {name!r}; python -m lm_eval ls tasks lists them."
            )


def load_task(name: str, manager: Any) -> Any:
    """A task of the harness with its data, which may take minutes.

    Raises:
        ValueError: Its data cannot be loaded.
        MissingPackageError: The task imports a package that is not installed.
    """
    import numpy as np

    # The harness's own seeds, so that a resumed run has the same prompts.
    random.seed(0)
    np.random.seed(1234)
    with needed_data(name), quiet_harness():
        return manager.load([name])["tasks"][name]


@contextmanager
def needed_data(name: str) -> Iterator[None]:
    """Turn errors of loading a task's data into one line.

    Raises:
        ValueError: The data cannot be loaded.
        MissingPackageError: The task imports a package that is not installed.
    """
    try:
        yield
    except ImportError as error:
        raise MissingPackageError(
            f"{name} needs a package that is not installed here: {error}; install it with pip."
        ) from None
    except (OSError, LookupError) as error:
        raise ValueError(
            f"the data of {name} is not available: {' '.join(str(error).split())[:200]}; it is "
            "downloaded on first use: run the task once with network access and the same "
            "HF_HOME, or exclude it with --tasks."
        ) from None


def task_scorer(
    task: Any, manager: Any, samples: int, metric: str | None, **options: Any
) -> Scorer:
    """A scorer that runs one task.

    Args:
        task: A task from `load_task`.
        manager: The result of `task_manager`.
        samples: Number of samples, from the beginning.
        metric: The metric of a sample; None takes its first metric.
        options: Arguments of the harness's model, such as the tokenizer.
    """

    def score(model: Any, tick: Tick) -> dict[str, float]:
        from lm_eval import evaluator
        from lm_eval.models.huggingface import HFLM

        with told_answers(model, tick), without_git(evaluator):
            lm = HFLM(pretrained=model, batch_size=1, **options)
            results = evaluator.simple_evaluate(
                lm, tasks=[task], limit=samples, bootstrap_iters=0, task_manager=manager
            )
        return sample_scores(results, lambda one: one[metric or one["metrics"][0]])

    return score


def sample_scores(results: Any, value: Any) -> dict[str, float]:
    """{sample: score}, from the results of a harness."""
    samples: Iterable[Any] = next(iter(results["samples"].values()))
    return {str(one["doc_id"]): float(value(one)) for one in samples}
