"""`xattn-video prefill`: runs a long prompt through a language model, sparse and dense."""

import json
from collections.abc import Container
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from xattn_video.files import write_json
from xattn_video.language.prefill_settings import PrefillSettings
from xattn_video.options.command import AsJson, command
from xattn_video.options.groups import loading
from xattn_video.options.prefill_options import DEMO_NEEDLE, LongPrompt, prefill_settings
from xattn_video.reporting.console import (
    output_console,
    print_labelled,
    print_message,
    print_warning,
    quiet_libraries,
    written_name,
)
from xattn_video.reporting.endings import ErrorsToExitCodes
from xattn_video.reporting.tables import Table, figure

if TYPE_CHECKING:
    from xattn_video.cli.prefill_job import PrefillJob
    from xattn_video.language.kv_memory import PrefillPlan
    from xattn_video.language.long_prompt import PrefillRun
    from xattn_video.language.prefill_report import LayerPrefill, PrefillReport
    from xattn_video.pipelines.loading import LoadOptions


@command
def prefill(
    prompt: LongPrompt,
    load: Annotated["LoadOptions", loading("dtype", "device")],
    settings: Annotated[PrefillSettings, prefill_settings()],
    errors: ErrorsToExitCodes,
    as_json: AsJson = False,
) -> None:
    """Prefill a long prompt with a language model: time, memory, density and the answer."""
    from xattn_video.cli.prefill_job import job_record, prepare_job, run_job

    quiet_libraries()
    job = prepare_job(prompt, load, settings)
    if not as_json:
        _print_plan(job)
    if job.shortage is not None and (prompt.plan or prompt.force):
        print_warning(job.shortage)
    if job.speed_only is not None:
        print_warning(f"Speed and memory only: {job.speed_only}.")
    if job.unknown_needle:
        print_warning(
            "The demo model has learned to find numbers of seven digits alone; use --needle "
            f"{DEMO_NEEDLE}."
        )
    if prompt.plan:
        _write(prompt.report, job_record(job, {}), as_json)
        return
    job.check_memory()
    model = job.load_model()
    errors.running = True
    runs = run_job(job, model, print_message)
    if not as_json:
        _print_runs(job, runs)
    _warn_of_dense(job, runs["sparse"].report)
    _write(prompt.report, job_record(job, runs), as_json)


def _write(path: Path | None, record: dict[str, Any], as_json: bool) -> None:
    """Write the report and name it; as JSON, print the record too, even if writing fails."""
    written: dict[str, Any] = {}
    try:
        if path is not None:
            replaced = path.exists()
            write_json(path, record)
            written = {"report": str(path), "replaced": replaced}
            if not as_json:
                report = written_name(path, replaced=replaced)
                print_labelled(output_console(), {"report": report})
    finally:
        if as_json:
            typer.echo(json.dumps(record | written, indent=2))


def _print_plan(job: "PrefillJob") -> None:
    plan = job.plan
    lines = {
        "model": f"{job.source.name}, {plan.parameters / 1e6:,.1f} million parameters",
        "tokens": f"{job.num_tokens:,} in chunks of {job.prompt.chunk_size:,}",
        "memory": _memory(plan, job.free_gib),
    }
    print_labelled(output_console(), lines)


def _memory(plan: "PrefillPlan", free: float | None) -> str:
    """The planned memory and its parts."""
    text = (
        f"about {plan.peak:.2f} GiB at the peak (an estimate: weights {plan.weights:.2f}, KV "
        f"cache {plan.kv_cache:.2f} at {plan.kv_kib_per_token:g} KiB per token, a chunk "
        f"{plan.work:.2f})"
    )
    return text if free is None else f"{text}; {free:.1f} GiB is free"


def _print_runs(job: "PrefillJob", runs: "dict[str, PrefillRun]") -> None:
    console = output_console()
    sparse, compare = runs["sparse"], job.prompt.compare
    assert sparse.report is not None
    lines = {name: _time(job, run) for name, run in runs.items()}
    if compare is not None:
        lines["faster"] = (
            f"sparse is {runs[compare].seconds / sparse.seconds:.2f}x as fast as {compare}"
        )
    lines["attention"] = sparse.report.summary()
    if sparse.report.sparse_layers and not all(one.sparse for one in sparse.report.layers):
        lines["density"] = "of the sparse layers alone; a dense layer computes all of its blocks"
    if job.speed_only is None:
        lines["answer"] = "; ".join(
            f"{name}: {job.describe_answer(run)}" for name, run in runs.items()
        )
        if compare is not None:
            lines["next token"] = _agreement(sparse, runs[compare])
    console.print()
    print_labelled(console, lines)
    console.print()
    console.print(_layers(sparse.report).terminal(console.width), crop=False)


def _warn_of_dense(job: "PrefillJob", report: "PrefillReport | None") -> None:
    if report is not None and not report.sparse_layers:
        reasons = report.dense_reasons
        print_warning(f"Nothing ran sparse ({', '.join(reasons)}); {_remedy(job, reasons)}.")


def _remedy(job: "PrefillJob", reasons: Container[str]) -> str:
    """How to make a prefill sparse that was dense for these reasons."""
    block_size = job.settings.sparse.block_size
    if "short chunk" in reasons:
        # The last chunk is short in other prompts too.
        for what, tokens in (("chunks", job.prompt.chunk_size), ("a prompt", job.num_tokens)):
            if tokens < block_size:
                return f"use {what} of at least a block, {block_size} tokens"
    if "too few tokens" in reasons:
        return "use a longer prompt, or --min-tokens 0 to try it"
    for what in ("threshold", "density"):
        if f"{what} 1" in reasons:
            return f"use a {what} below 1"
    if "dense layer" in reasons:
        return "use fewer --dense-layers: the other layers cannot run sparse"
    if "window" in reasons:
        return "every layer of this model sees a limited number of tokens"
    return "docs/long_context.md explains these reasons"


def _agreement(sparse: "PrefillRun", other: "PrefillRun") -> str:
    """Whether the first new token is the same, and the divergence of its distributions."""
    same = sparse.new_tokens[0] == other.new_tokens[0]
    return (
        f"{'the same' if same else 'another'} as dense attention's, "
        f"KL divergence {sparse.divergence_from(other):.3g}"
    )


def _time(job: "PrefillJob", run: "PrefillRun") -> str:
    """Seconds, speed and memory of a run."""
    text = f"{run.seconds:.2f} s, {job.num_tokens / run.seconds:,.0f} tokens/s"
    if len(run.new_tokens) > 1:
        each = run.decode_seconds / (len(run.new_tokens) - 1)
        text += f"; then {each * 1e3:.1f} ms for a new token"
    if run.peak_memory_gib is not None:
        text += f"; {run.peak_memory_gib:.2f} GiB at the peak"
    return text


def _layers(report: "PrefillReport") -> Table:
    """Density by layer, and why a layer ran dense."""
    columns: dict[str, Any] = {
        "layer": lambda one: "other" if one.layer is None else one.layer,
        "sparse": lambda one: one.sparse,
        "density": lambda one: figure(one.density, ".3f"),
        "dense": _reasons,
    }
    return Table.of(report.layers, columns)


def _reasons(one: "LayerPrefill") -> str:
    return ", ".join(f"{reason} {count}" for reason, count in one.dense.items())
