"""LongBench with lm-evaluation-harness.

python -m eval_language.longbench --run runs/longbench --model meta-llama/Llama-3.1-8B-Instruct
"""

from typing import TYPE_CHECKING

from eval_language.harness_run import (
    HarnessOptions,
    Prepared,
    find_model,
    harness_command,
    model_loader,
)
from xattn_video.reporting.console import print_message

if TYPE_CHECKING:
    from xattn_video.pipelines.loading import LoadOptions

# The retrieval tasks that the paper's table omits, then the table's columns.
_TASKS = (
    "passage_retrieval_en passage_retrieval_zh narrativeqa qasper multifieldqa_en hotpotqa "
    "2wikimqa musique gov_report qmsum vcsum multi_news trec triviaqa samsum lsht lcc repobench-p"
)


def tasks(asked: HarnessOptions) -> list[str]:
    """The tasks that are asked for."""
    return asked.tasks.split(",") if asked.tasks else [f"longbench_{n}" for n in _TASKS.split()]


def prepare(asked: HarnessOptions, load: "LoadOptions") -> Prepared:
    """Load the data sets from the hub or its cache."""
    from eval_language.lm_eval_tasks import check_tasks, load_task, task_manager, task_scorer

    source = find_model(asked, 0)
    tokenizer = source.load_tokenizer()
    names = tasks(asked)
    manager = task_manager({})
    check_tasks(names, manager)
    loaded = {}
    for name in names:
        print_message(f"{name}: reading its data")
        loaded[name] = load_task(name, manager)
    scorers = {
        name: ("all tasks", task_scorer(task, manager, asked.samples, None, tokenizer=tokenizer))
        for name, task in loaded.items()
    }

    return Prepared(scorers, model_loader(source, load))


app = harness_command("LongBench", "lm_eval[longbench]>=0.4.13", HarnessOptions, tasks, prepare)

if __name__ == "__main__":
    app()
