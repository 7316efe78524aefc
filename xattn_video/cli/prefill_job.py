"""The work of `xattn-video prefill`: checks, the prompt, the runs and their record."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from xattn_video.files import check_output_path
from xattn_video.language.kv_memory import (
    PrefillPlan,
    describe_prefill_shortage,
    head_dim,
    plan_prefill,
)
from xattn_video.language.long_prompt import PrefillRun, run_prefill
from xattn_video.language.model_sources import LanguageSource, find_language_model
from xattn_video.language.needle import answer_tokens, needle_prompt
from xattn_video.language.prefill_settings import PrefillSettings
from xattn_video.language.registration import check_transformers
from xattn_video.options.prefill_options import (
    DEFAULT_NEEDLE,
    DEFAULT_TOKENS,
    DEMO_NEEDLE,
    LongPrompt,
)
from xattn_video.pipelines.memory import find_room
from xattn_video.policy.settings import SparseSettings
from xattn_video.reporting.machine import machine_record

if TYPE_CHECKING:
    from xattn_video.pipelines.loading import LoadOptions

# New tokens if there is no answer: enough to measure the time of one.
_TIMED_TOKENS = 32


@dataclass(frozen=True, slots=True)
class PrefillJob:
    """A checked command.

    Attributes:
        prompt, load, settings: The options as given.
        source: The model.
        tokenizer: Its tokenizer; None with random weights.
        num_tokens: Number of tokens in the prompt.
        tokens: The prompt, int64 `[1, S]`; empty if it will not run, as the memory is too small.
        max_new_tokens: Tokens to generate.
        plan: The planned memory.
        free_gib: Free memory of the device in GiB; None if unknown.
        speed_only: Why the generated text means nothing; None if it is meaningful.
    """

    prompt: LongPrompt
    load: "LoadOptions"
    settings: PrefillSettings
    source: LanguageSource
    tokenizer: Any
    num_tokens: int
    tokens: Tensor
    max_new_tokens: int
    plan: PrefillPlan
    free_gib: float | None
    speed_only: str | None

    @property
    def needle(self) -> str:
        """The hidden text."""
        return _needle(self.prompt, self.source)

    @property
    def unknown_needle(self) -> bool:
        """Whether the model is the demo model and was not trained to find such a text."""
        text = self.needle
        return self.source.is_demo and not (text.isdecimal() and len(text) == len(DEMO_NEEDLE))

    @property
    def shortage(self) -> str | None:
        """Why the memory is too small, and what would fit; None if it is large enough."""
        return describe_prefill_shortage(self.plan, self.free_gib)

    def check_memory(self) -> None:
        """Raise ValueError, with what would fit, if the memory is too small and not forced."""
        if self.shortage is not None and not self.prompt.force:
            raise ValueError(f"{self.shortage} --force runs it anyway.")

    def load_model(self) -> PreTrainedModel:
        """The model, loaded; raises ValueError if its files are damaged."""
        return self.source.load(self.load.resolved_dtype, self.load.resolved_device)

    def answer(self, run: PrefillRun) -> str | None:
        """The first line of the model's answer; None with random weights."""
        if self.tokenizer is None:
            return None
        text: str = self.tokenizer.decode(run.new_tokens, skip_special_tokens=True)
        return " ".join(text.strip().split("\n")[0].split())

    def describe_answer(self, run: PrefillRun) -> str:
        """The model's answer, and whether the needle is in it."""
        found = "found" if self.found(run) else "not found"
        return f"{self.answer(run)!r}, {self.needle!r} {found}"

    def found(self, run: PrefillRun) -> bool:
        """Whether the needle is in the model's answer."""
        answer, needle = (self.answer(run) or "").casefold(), self.needle.casefold()
        # A number that is part of a longer one does not count.
        return needle in (re.findall(r"\d+", answer) if needle.isdecimal() else answer)


def prepare_job(prompt: LongPrompt, load: "LoadOptions", settings: PrefillSettings) -> PrefillJob:
    """Check everything that can be checked before weights are loaded.

    Raises:
        ValueError: There is no such model, the settings or the prompt do not fit it, or the
            scoring precision is not available.
        BackendUnavailableError: The backend cannot run the model's heads here.
        MissingPackageError: The model needs a package that is not installed.
    """
    check_transformers()
    if prompt.report is not None:
        check_output_path(prompt.report, (".json",), what="report")
    num_tokens = DEFAULT_TOKENS if prompt.tokens is None else prompt.tokens
    # With random weights the context is whatever is requested here.
    source = find_language_model(prompt.model, num_tokens + _TIMED_TOKENS)
    config = source.text_config
    settings.check_config(config, repr(prompt.model))
    tokenizer, max_new_tokens = None, _TIMED_TOKENS
    if source.is_random:
        if prompt.needle is not None:
            raise ValueError(
                "a needle is for a trained model to find, and the weights are random; leave "
                "--needle out."
            )
        beyond: str | None = "the weights are random"
    else:
        tokenizer = source.load_tokenizer()
        needle = _needle(prompt, source)
        max_new_tokens = answer_tokens(tokenizer, needle)
        if prompt.tokens is None and source.context is not None:
            num_tokens = min(num_tokens, source.context - max_new_tokens)
        # Before the prompt, which takes minutes where it is far too long.
        beyond = _check_context(prompt, num_tokens, source, max_new_tokens)
    if not prompt.plan:
        settings.sparse.backend_for(
            load.resolved_device, load.resolved_dtype, head_dim(config), causal=True
        )
        source.check_files()
    room = find_room(load)
    free_gib = room.gpu if load.resolved_device.type == "cuda" else room.host
    plan = plan_prefill(
        source,
        num_tokens,
        max_new_tokens,
        prompt.chunk_size,
        load.resolved_dtype,
        settings.sparse.block_size,
    )
    runs = not prompt.plan and prompt.force
    if describe_prefill_shortage(plan, free_gib) is not None and not runs:
        # Only the plan is needed, and the prompt alone may not fit.
        tokens = torch.empty(1, 0, dtype=torch.long)
    elif tokenizer is None:
        torch.manual_seed(0)
        tokens = torch.randint(config.vocab_size, (1, num_tokens))
    else:
        tokens = needle_prompt(tokenizer, num_tokens, needle, prompt.depth)
    return PrefillJob(
        prompt,
        load,
        settings,
        source,
        tokenizer,
        num_tokens,
        tokens,
        max_new_tokens,
        plan,
        free_gib,
        beyond,
    )


def run_job(
    job: PrefillJob, model: PreTrainedModel, say: Callable[[str], None]
) -> dict[str, PrefillRun]:
    """Run the model: ``sparse``, and the runs to compare with it, by name."""
    kinds: dict[str, PrefillSettings | None] = {"sparse": job.settings}
    if job.prompt.compare == "dense":
        # The same code with tau 1, which needs no mask over a chunk's queries and all keys.
        dense = SparseSettings(1.0, min_tokens=0, block_size=job.settings.sparse.block_size)
        kinds["dense"] = PrefillSettings(dense)
    elif job.prompt.compare == "sdpa":
        kinds["sdpa"] = None
    runs = {}
    for kind, settings in kinds.items():

        def tell(tokens: int, seconds: float, kind: str = kind) -> None:
            say(f"  {kind}: {tokens:,} of {job.num_tokens:,} tokens, chunk {seconds:.2f} s")

        runs[kind] = run_prefill(
            model,
            job.tokens,
            settings,
            chunk_size=job.prompt.chunk_size,
            max_new_tokens=job.max_new_tokens,
            on_chunk=tell,
        )
    return runs


def job_record(job: PrefillJob, runs: dict[str, PrefillRun]) -> dict[str, Any]:
    """Plan, settings and, if there are runs, measurements, as JSON values."""
    content: dict[str, Any] = {
        **machine_record(job.load.resolved_device, "transformers"),
        "model": job.source.name,
        "dtype": str(job.load.resolved_dtype).removeprefix("torch."),
        "tokens": job.num_tokens,
        "chunk_size": job.prompt.chunk_size,
        "speed_only": job.speed_only,
        "settings": job.settings.to_dict(),
        "plan": job.plan.to_dict(),
        "runs": {kind: _record(job, run) for kind, run in runs.items()},
    }
    for other in list(runs.values())[1:]:
        sparse = runs["sparse"]
        content["speedup"] = other.seconds / sparse.seconds
        if job.speed_only is None:
            content["kl_divergence"] = sparse.divergence_from(other)
    return content


def _record(job: PrefillJob, run: PrefillRun) -> dict[str, Any]:
    record: dict[str, Any] = {
        "seconds": run.seconds,
        "chunk_seconds": list(run.chunk_seconds),
        "new_tokens": len(run.new_tokens),
        "decode_seconds": run.decode_seconds,
        "peak_memory_gib": run.peak_memory_gib,
        "report": None if run.report is None else run.report.to_dict(),
    }
    if job.speed_only is None:
        record |= {"needle": job.needle, "answer": job.answer(run), "found": job.found(run)}
    return record


def _needle(prompt: LongPrompt, source: LanguageSource) -> str:
    return prompt.needle or (DEMO_NEEDLE if source.is_demo else DEFAULT_NEEDLE)


def _check_context(
    prompt: LongPrompt, num_tokens: int, source: LanguageSource, max_new_tokens: int
) -> str | None:
    """Why the generated text means nothing beyond the model's context; None within it.

    Raises:
        ValueError: The prompt exceeds the context, which was not allowed or is not possible.
    """
    context = source.context
    if context is None or num_tokens + max_new_tokens <= context:
        return None
    can_exceed = not source.ends_with_context()
    if not prompt.beyond_context or not can_exceed:
        advice = (
            ", or --beyond-context for speed and memory alone"
            if can_exceed
            else "; its positions are a table that ends there"
        )
        raise ValueError(
            f"the model's context is {context:,} tokens, got {num_tokens:,} and "
            f"{max_new_tokens} for the answer; use --tokens {context - max_new_tokens} or fewer"
            f"{advice}."
        )
    return f"the prompt is longer than the model's context of {context:,} tokens"
