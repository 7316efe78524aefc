"""RULER with lm-evaluation-harness.

python -m eval_language.ruler --run runs/ruler --model demo --lengths 8192,16384
"""

from dataclasses import dataclass
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from eval_language.harness_run import (
    HarnessOptions,
    Prepared,
    find_model,
    harness_command,
    model_loader,
)
from xattn_video.options.command import knob
from xattn_video.reporting.console import print_message

if TYPE_CHECKING:
    from xattn_video.pipelines.loading import LoadOptions

# Tasks with several keys come first: a single needle in filler is found even when others are not.
TASKS = (
    "niah_multikey_2,niah_multikey_3,niah_multivalue_repeat,niah_multiquery_repeat,"
    "niah_single_1,ruler_vt,ruler_cwe,ruler_fwe"
)
# Room for the prompts of fwe, which are longer than requested.
_OVERSHOOT = 256


@dataclass(frozen=True, slots=True)
class RulerOptions(HarnessOptions):
    """The options of RULER."""

    lengths: str = knob("Tokens of a prompt and its answer, between commas.", "8192,16384,32768")


def prepare(asked: RulerOptions, load: "LoadOptions") -> Prepared:
    """Generate the prompts with the model's tokenizer."""
    from eval_language.lm_eval_tasks import check_tasks, load_task, task_manager, task_scorer

    lengths = [_length(text, asked.lengths) for text in asked.lengths.split(",")]
    source = find_model(asked, max(lengths))
    context = source.context
    if context is not None and max(lengths) > context:
        raise ValueError(
            f"the model's context is {context:,} tokens, got a length of {max(lengths):,}; use "
            "shorter ones."
        )
    if context is not None and max(lengths) + _OVERSHOOT > context and source.ends_with_context():
        raise ValueError(
            f"the model's table of positions ends at {context:,} tokens, and some prompts are up "
            f"to {_OVERSHOOT} tokens longer than asked for, got a length of {max(lengths):,}; use "
            f"--lengths {context - _OVERSHOOT} or fewer."
        )
    tokenizer = source.load_tokenizer()
    scorers = {}
    with TemporaryDirectory() as folder:
        # The harness loads its own tokenizer to measure prompts.
        tokenizer.save_pretrained(folder)
        for length in lengths:
            manager = task_manager({"tokenizer": folder, "max_seq_lengths": [length]})
            names = (asked.tasks or TASKS).split(",")
            check_tasks(names, manager)
            for name in names:
                print_message(f"{name}, {length}: generating prompts")
                task = load_task(name, manager)
                if not next(iter(task.test_docs()))["outputs"]:
                    raise ValueError(
                        f"{name} has no room for an answer in a length of {length:,}; use longer "
                        "--lengths, or leave the task out with --tasks."
                    )
                options = {"tokenizer": tokenizer, "max_length": length + _OVERSHOOT}
                scorer = task_scorer(task, manager, asked.samples, str(length), **options)
                scorers[f"{name}, {length}"] = (f"all, {length}", scorer)

    return Prepared(scorers, model_loader(source, load))


def _length(text: str, lengths: str) -> int:
    """One of the lengths, in the digits 0 to 9 as numbers of other options."""
    if not (text.isascii() and text.strip().isdecimal()):
        raise ValueError(f"lengths must be numbers, got {lengths!r}; use 8192,16384.")
    return int(text)


app = harness_command("RULER", "lm_eval[ruler]>=0.4.13", RulerOptions, prepare)

if __name__ == "__main__":
    app()
