"""RULER with lm-evaluation-harness.

python -m eval_language.ruler --run runs/ruler --model demo --lengths 8192,16384
"""

from dataclasses import dataclass
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from eval_language.harness_run import (
    HarnessOptions,
    Prepared,
    find_model,
    harness_command,
    model_loader,
)
from xattn_video.options.command import knob
from xattn_video.reporting.console import print_message, print_warning

if TYPE_CHECKING:
    from xattn_video.pipelines.loading import LoadOptions

# Tasks with several keys come first: a single needle in filler is found even when others are not.
TASKS = (
    "niah_multikey_2,niah_multikey_3,niah_multivalue_repeat,niah_multiquery_repeat,"
    "niah_single_1,ruler_vt,ruler_cwe,ruler_fwe"
)
# Room for the prompts of fwe, which are longer than requested.
_OVERSHOOT = 256
# With fewer tokens, the example in a prompt of ruler_vt leaves no room for the rest, and the
# harness tries without end.
_SHORTEST = 1024


@dataclass(frozen=True, slots=True)
class RulerOptions(HarnessOptions):
    """The options of RULER."""

    lengths: str = knob("Tokens of a prompt and its answer, between commas.", "8192,16384,32768")


def tasks(asked: RulerOptions) -> list[str]:
    """The tasks that are asked for, at every length."""
    return [_key(name, length) for length in _lengths(asked) for name in _names(asked)]


def prepare(asked: RulerOptions, load: "LoadOptions") -> Prepared:
    """Generate the prompts with the model's tokenizer."""
    from eval_language.lm_eval_tasks import check_tasks, task_manager, task_scorer

    lengths, names = _lengths(asked), _names(asked)
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
    scorers, left_out = {}, []
    with TemporaryDirectory() as folder:
        # The harness loads its own tokenizer to measure prompts.
        tokenizer.save_pretrained(folder)
        for length in lengths:
            manager = task_manager({"tokenizer": folder, "max_seq_lengths": [length]})
            check_tasks(names, manager)
            for name in names:
                print_message(f"{name}, {length}: generating prompts")
                task = _load(name, manager)
                if task is None:
                    print_warning(
                        f"{name} has no room for an answer in a length of {length:,} and is left "
                        "out."
                    )
                    left_out.append(_key(name, length))
                    continue
                options = {"tokenizer": tokenizer, "max_length": length + _OVERSHOOT}
                scorer = task_scorer(task, manager, asked.samples, str(length), **options)
                scorers[_key(name, length)] = (f"all, {length}", scorer)

    if not scorers:
        raise ValueError(
            f"no task has room for an answer, got --lengths {asked.lengths}; use longer ones, or "
            "other --tasks."
        )
    return Prepared(scorers, model_loader(source, load), tuple(left_out))


def _load(name: str, manager: Any) -> Any:
    """A task with its prompts; None if no question fits in its length.

    Where the words of ruler_cwe are many tokens, not even ten of them fit: from 4,096 tokens on
    they are repeated 30 times each, and below 6 times.
    """
    from eval_language.lm_eval_tasks import load_task

    try:
        task = load_task(name, manager)
    except ValueError as error:
        # The harness's own words.
        if "Could not generate any sample" not in str(error):
            raise
        return None
    return task if next(iter(task.test_docs()))["outputs"] else None


def _key(name: str, length: int) -> str:
    return f"{name}, {length}"


def _names(asked: RulerOptions) -> list[str]:
    return (asked.tasks or TASKS).split(",")


def _lengths(asked: RulerOptions) -> list[int]:
    """The lengths, in the digits 0 to 9 as numbers of other options."""
    words = asked.lengths.split(",")
    if not all(word.isascii() and word.strip().isdecimal() for word in words):
        raise ValueError(f"lengths must be numbers, got {asked.lengths!r}; use 8192,16384.")
    lengths = [int(word) for word in words]
    if min(lengths) < _SHORTEST:
        raise ValueError(
            f"lengths must be at least {_SHORTEST}, got {min(lengths)}; use 8192,16384."
        )
    if len(set(lengths)) < len(lengths):
        raise ValueError(f"lengths must differ, got {asked.lengths!r}; give each once.")
    return lengths


app = harness_command("RULER", "lm_eval[ruler]>=0.4.13", RulerOptions, tasks, prepare)

if __name__ == "__main__":
    app()
