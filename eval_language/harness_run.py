"""A resumable run of a harness: dense and every sparse setting on the same samples."""

import json
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import count, product
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Annotated, Any

import typer

from eval_language.harness_output import Tick
from xattn_video.errors import MissingPackageError
from xattn_video.files import check_run_folder, write_json, write_text
from xattn_video.measure.paired_scores import PairedScores, Record
from xattn_video.options.command import CONTEXT_SETTINGS, command, knob
from xattn_video.options.groups import loading
from xattn_video.pipelines.item_folder import ItemFolder
from xattn_video.reporting.console import (
    output_console,
    print_labelled,
    print_message,
    quiet_libraries,
)
from xattn_video.reporting.endings import ErrorsToExitCodes, OneLineCommand
from xattn_video.reporting.machine import describe_versions, machine_record
from xattn_video.reporting.tables import Table, figure
from xattn_video.reporting.web_page import WebPage

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from xattn_video.language.model_sources import LanguageSource
    from xattn_video.language.prefill_settings import PrefillSettings
    from xattn_video.pipelines.loading import LoadOptions

_REPORTS = ("report.json", "report.md", "report.html")
_PAPER = Path(__file__).parent / "data" / "paper_tables.json"
Scorer = Callable[[Any, Tick], dict[str, float]]
"""Function that runs one task with the loaded model and returns {sample: score}."""


@dataclass(frozen=True, slots=True)
class HarnessOptions:
    """The options that all harnesses share."""

    run: Path = knob("Folder of the run and its report; an existing run is resumed.", ...)
    model: str = knob("demo (ships with the package), a hub ID, a folder or a .gguf file.", ...)
    tasks: str | None = knob("Task names, separated by commas.", shown_default="the paper's")
    settings: str = knob(
        "Sparse settings to compare with dense, as THRESHOLD:STRIDE or "
        "THRESHOLD:STRIDE:DENSE_LAYERS.",
        "0.9:8,0.9:16",
    )
    samples: int = knob("Number of samples per task, from the beginning.", 100)
    dense_layers: int = knob(
        "Number of first layers that stay dense, where a setting does not say.", 0
    )
    min_tokens: int = knob("With fewer tokens so far, a chunk runs dense.", 0)

    def variants(self) -> "dict[str, PrefillSettings | None]":
        """{label: settings}, dense (None) and every sparse setting.

        Raises:
            ValueError: A setting has another format, or it or the number of samples is out of
                range.
        """
        from xattn_video.language.prefill_settings import PrefillSettings

        if self.samples < 1:
            raise ValueError(f"samples must be at least 1, got {self.samples}; use 100.")
        variants: dict[str, PrefillSettings | None] = {"dense": None}
        for text in self.settings.split(","):
            words = text.split(":")
            names_layers = len(words) > 2
            if not names_layers:
                words.append(str(self.dense_layers))
            try:
                # As other options: Python alone would take digits of every script.
                text.encode("ascii")
                threshold, *counts = words
                tau, (stride, dense_layers) = float(threshold), map(int, counts)
            except ValueError:
                raise ValueError(
                    "settings must be THRESHOLD:STRIDE or THRESHOLD:STRIDE:DENSE_LAYERS, got "
                    f"{text!r}; use 0.9:8,0.9:16."
                ) from None
            label = f"tau {tau:g}, stride {stride}"
            if names_layers:
                label += f", {dense_layers} dense layer{'s' * (dense_layers != 1)}"
            if label in variants:
                raise ValueError(f"settings must differ, got {label} twice; give each once.")
            try:
                variants[label] = PrefillSettings.of(
                    tau, dense_layers, stride=stride, min_tokens=self.min_tokens
                )
            except ValueError as error:
                raise ValueError(f"settings {text!r}: {error}") from None
        return variants


@dataclass(frozen=True, slots=True)
class Prepared:
    """The prepared tasks of a harness; nothing is written yet.

    Attributes:
        scorers: {task: (its group, such as a length, and its scorer)}.
        load: Function that loads the argument of the scorers, and the model in it.
        left_out: The tasks that were asked for and cannot run.
    """

    scorers: Mapping[str, tuple[str, Scorer]]
    load: "Callable[[], tuple[Any, PreTrainedModel]]"
    left_out: tuple[str, ...] = ()


def find_model(asked: HarnessOptions, max_tokens: int) -> "LanguageSource":
    """A language model that has the files and the layers that are asked for.

    Raises:
        ValueError, MissingPackageError: As `find_language_model`; a file is damaged, or a setting
            names layers that the model lacks.
        UnsupportedModelError: The model has no attention.
    """
    from xattn_video.language.model_sources import find_language_model

    source = find_language_model(asked.model, max_tokens)
    check_layers(asked, source.text_config, asked.model)
    source.check_files()
    return source


def check_layers(asked: HarnessOptions, text_config: Any, name: str) -> None:
    """Check the sparse settings against a model, before anything runs dense.

    Raises:
        ValueError: A setting names layers that the model lacks.
        UnsupportedModelError: The model has no attention.
    """
    for settings in asked.variants().values():
        if settings is not None:
            settings.check_config(text_config, repr(name))


def model_loader(
    source: "LanguageSource", load: "LoadOptions"
) -> "Callable[[], tuple[PreTrainedModel, PreTrainedModel]]":
    """A ``load`` of `Prepared` for scorers that take the model itself."""

    def loaded() -> "tuple[PreTrainedModel, PreTrainedModel]":
        model = source.load(load.resolved_dtype, load.resolved_device)
        return model, model

    return loaded


def harness_command(
    name: str,
    package: str | None,
    options: type[HarnessOptions],
    tasks: "Callable[[Any], list[str]]",
    prepare: "Callable[[Any, LoadOptions], Prepared]",
) -> typer.Typer:
    """The command that scores a model with a harness.

    Args:
        name: Name of the benchmark in the paper's tables.
        package: The harness as a requirement for pip; None if there is none.
        options: The dataclass of the options.
        tasks: Function that tells the keys of the scorers from the options alone.
        prepare: Function that loads the tasks and their data.
    """

    def main(asked: HarnessOptions, load: "LoadOptions", errors: ErrorsToExitCodes) -> None:
        if package is not None:
            _require(name, package)
        variants = asked.variants()
        _refuse_random(asked.model)
        quiet_libraries()
        folder = ItemFolder(asked.run, asked.run, "give another --run, or the same settings")
        about = {
            "benchmark": name,
            "model": asked.model,
            "tasks": tasks(asked),
            "samples": asked.samples,
            "dtype": str(load.resolved_dtype).removeprefix("torch."),
        }
        settings = {label: one and one.to_dict() for label, one in variants.items()}
        # Before the prompts, which may take minutes.
        folder.check({**about, "settings": settings})
        _refuse_other_reports(folder)
        check_run_folder(asked.run, what="run")
        prepared = prepare(asked, load)
        with folder.lock():
            folder.adopt({**about, "settings": settings})
            _score(folder, prepared, variants, asked.samples, errors)
        table = _write(folder, about, prepared, list(variants))
        console = output_console()
        console.print(table.terminal(console.width), crop=False)
        print_labelled(console, {"report": str(asked.run / "report.md")})

    main.__doc__ = f"Score a language model on {name}, dense and sparse. Run it again to resume."
    main.__annotations__ |= {
        "asked": options,
        "load": Annotated[Any, loading("dtype", "device")],
    }
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command(cls=OneLineCommand, context_settings=CONTEXT_SETTINGS)(command(main))
    return app


def _refuse_other_reports(folder: ItemFolder) -> None:
    """Raise ValueError for a folder with a report of something else, which would be replaced."""
    others = [name for name in _REPORTS if (folder.path / name).exists()]
    if others and not folder.settings_file.exists():
        raise ValueError(
            f"{str(folder.path)!r} holds {others[0]} and no run; give another --run, or move it."
        )


def _require(name: str, package: str) -> None:
    module = re.split(r"[\[>]", package)[0].replace("-", "_")
    if find_spec(module) is None:
        raise MissingPackageError(
            f"{name} needs {module}, which is not installed; pip install '{package}'."
        )


def _refuse_random(model: str) -> None:
    from xattn_video.language.model_sources import RANDOM

    if model.startswith(RANDOM):
        raise ValueError(
            f"model {model!r} has random weights, whose answers mean nothing; use demo, a hub ID, "
            "a folder or a .gguf file."
        )


def _score(
    folder: ItemFolder,
    prepared: Prepared,
    variants: "dict[str, PrefillSettings | None]",
    samples: int,
    errors: ErrorsToExitCodes,
) -> None:
    """Score the tasks and settings that the folder lacks."""
    from xattn_video.language.long_prompt import prefill_attention

    loaded = None
    for (task, (_, scorer)), (label, settings) in product(
        prepared.scorers.items(), variants.items()
    ):
        if folder.record(_key(task, label)) is not None:
            continue
        if loaded is None:
            loaded = prepared.load()
            errors.running = True
        scored, model = loaded
        start = time.perf_counter()
        with prefill_attention(model, settings) as handle:
            scores = scorer(scored, _ticker(f"{task}, {label}", samples))
        report = handle.report() if handle else None
        record = {
            "scores": scores,
            "seconds": time.perf_counter() - start,
            "density": report and report.density,
            "attention": report and report.summary(),
            **machine_record(model.device, "transformers", "lm_eval", "lmms-eval"),
        }
        folder.add(_key(task, label), (), record)
        print_message(f"{task}, {label}: {mean(scores.values()):.3f}, {record['seconds']:.0f} s")


def _ticker(what: str, samples: int) -> Tick:
    """Counts samples, and prints every tenth part of them."""
    numbers = count(1)

    def tick() -> None:
        number = next(numbers)
        if number * 10 // samples > (number - 1) * 10 // samples:
            print_message(f"  {what}: {number} of {samples} samples")

    return tick


def _key(task: str, label: str) -> str:
    return f"{task}, {label}".replace(", ", "-").replace(" ", "-")


def _write(folder: ItemFolder, about: Record, prepared: Prepared, labels: list[str]) -> Table:
    """Write the report of a complete run as JSON, Markdown and a web page; returns its table."""
    records = {
        (task, label): folder.record(_key(task, label)) or {}
        for task, label in product(prepared.scorers, labels)
    }
    origin = {f"{one['device']}; {describe_versions(one['versions'])}" for one in records.values()}
    paper = json.loads(_PAPER.read_text(encoding="utf-8"))[about["benchmark"]]
    papers = ((paper["heading"], _paper_table(paper)),) if "rows" in paper else ()
    table = _table(records, prepared.scorers, labels)
    page = WebPage(
        title=f"{about['benchmark']}, dense and sparse",
        lead=f"{about['model']}, {about['dtype']}, at most {about['samples']} samples per task. "
        f"{' '.join(sorted(origin))}.",
        tables=(("Measured", table), *papers),
        notes=(
            "Density: of the blocks of the sparse layers alone.",
            *paper["remarks"],
            *(f"{task} has no room for an answer and is left out." for task in prepared.left_out),
        ),
    )
    results = [{"task": task, "setting": label, **one} for (task, label), one in records.items()]
    content = {**about, "tasks": list(prepared.scorers), "results": results}
    values, text, web = (folder.path / name for name in _REPORTS)
    write_json(values, content)
    write_text(text, page.markdown())
    write_text(web, page.html())
    return table


def _paper_table(paper: Record) -> Table:
    return Table(tuple(paper["columns"]), tuple(tuple(map(str, row)) for row in paper["rows"]))


def _table(
    records: dict[tuple[str, str], Record],
    scorers: Mapping[str, tuple[str, Scorer]],
    labels: list[str],
) -> Table:
    """A row for each task and setting, and one for all tasks of a group."""
    groups: dict[str, list[str]] = {}
    for task, (group, _) in scorers.items():
        groups.setdefault(group, []).append(task)
    rows = []
    for group, tasks in groups.items():
        parts = [(task, [task]) for task in tasks] + [(group, tasks)] * (len(tasks) > 1)
        for (name, part), label in product(parts, labels):
            dense, of = ([records[task, one] for task in part] for one in (labels[0], label))
            rows.append((name, label, *_cells(dense, of if label != labels[0] else dense)))
    headings = ("task", "setting", "n", "score", "delta", "95% interval", "density", "s")
    return Table(headings, tuple(rows), num_left=2)


def _cells(dense: Sequence[Record], of: Sequence[Record]) -> tuple[str, ...]:
    """Samples, score, difference from dense, interval, density and seconds."""
    found = PairedScores.of(dense, of)
    difference = found.difference
    return (
        str(found.samples),
        f"{found.score:.3f}",
        figure(difference.mean if difference else None, "+.3f"),
        difference.interval if difference else "",
        figure(found.density, ".3f"),
        f"{found.seconds:.0f}",
    )
