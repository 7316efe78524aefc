"""Prefills a long prompt in chunks, generates an answer, and measures both."""

import inspect
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel, StaticCache

from xattn_video.language.prefill_report import PrefillReport
from xattn_video.language.prefill_settings import PrefillSettings
from xattn_video.language.registration import LanguageHandle, enable_prefill

_GIB = 2**30


@dataclass(frozen=True, slots=True)
class PrefillRun:
    """The prefill of a prompt, and the answer.

    Attributes:
        chunk_seconds: Seconds of each chunk.
        decode_seconds: Seconds of all new tokens but the first, which comes from the prefill.
        peak_memory_gib: Peak memory of tensors, weights included; None on a CPU.
        new_tokens: The generated tokens.
        logits: Logits of the first new token, float32 `[vocabulary]`, on the CPU.
        report: What attention did; None for the model's own attention.
    """

    chunk_seconds: tuple[float, ...]
    decode_seconds: float
    peak_memory_gib: float | None
    new_tokens: tuple[int, ...]
    logits: Tensor
    report: PrefillReport | None

    @property
    def seconds(self) -> float:
        """Seconds of the prefill."""
        return sum(self.chunk_seconds)

    def divergence_from(self, other: "PrefillRun") -> float:
        """KL divergence, in nats, of the first new token's distribution from another run's."""
        ours, theirs = self.logits.log_softmax(-1), other.logits.log_softmax(-1)
        found = float(F.kl_div(ours, theirs, log_target=True, reduction="sum"))
        # Between nearly equal distributions, rounding may leave less than the true minimum. NaN
        # stays.
        return 0.0 if found < 0 else found


def run_prefill(
    model: PreTrainedModel,
    tokens: Tensor,
    settings: PrefillSettings | None,
    *,
    chunk_size: int,
    max_new_tokens: int,
    on_chunk: Callable[[int, float], None] = lambda tokens, seconds: None,
) -> PrefillRun:
    """Prefill a prompt in chunks with a static cache, then decode greedily.

    Args:
        model: A causal language model.
        tokens: The prompt, int64 `[1, S]`.
        settings: When and how attention is sparse; None for the model's own attention.
        chunk_size: Tokens of a forward pass.
        max_new_tokens: Tokens to generate, at least 1; fewer if the model ends its answer.
        on_chunk: Called after each chunk with the tokens so far and the chunk's seconds.
    """
    device = model.device
    tokens = tokens.to(device)
    chunks = tokens.split(chunk_size, dim=1)
    if device.type == "cuda":
        # Compiles and tunes the kernels, for a first chunk and for one that follows keys.
        with prefill_attention(model, settings):
            _Reader(model, 2 * chunk_size).read_all(chunks[:2])
        torch.cuda.reset_peak_memory_stats(device)
    with prefill_attention(model, settings) as handle:
        reader = _Reader(model, tokens.shape[1] + max_new_tokens)
        seconds = reader.read_all(chunks, on_chunk)
        logits = reader.logits
        start = time.perf_counter()
        new_tokens = reader.write(max_new_tokens)
        decode_seconds = time.perf_counter() - start
    peak = torch.cuda.max_memory_allocated(device) / _GIB if device.type == "cuda" else None
    report = None if handle is None else handle.report()
    return PrefillRun(tuple(seconds), decode_seconds, peak, tuple(new_tokens), logits, report)


def prefill_attention(
    model: PreTrainedModel, settings: PrefillSettings | None
) -> AbstractContextManager[LanguageHandle | None]:
    """A context with sparse attention as in the settings; None keeps the model's own attention."""
    if settings is None:
        return nullcontext()
    return enable_prefill(model, settings.sparse, dense_layers=settings.dense_layers)


class _Reader:
    """A model with its cache and the logits of the latest token, `[vocabulary]`."""

    def __init__(self, model: PreTrainedModel, max_tokens: int) -> None:
        cache = StaticCache(config=model.config, max_cache_len=max_tokens)
        # The argument is past_key_values before transformers 5.23 and cache from then on.
        names = inspect.signature(model.forward).parameters
        self._options: dict[str, Any] = {
            "cache" if "cache" in names else "past_key_values": cache,
            "use_cache": True,
            "logits_to_keep": 1,
        }
        self._model = model
        self.logits = torch.empty(0)

    @torch.inference_mode()
    def read(self, tokens: Tensor) -> float:
        """Run tokens `[1, S]` through the model; returns the seconds."""
        start = time.perf_counter()
        out = self._model(tokens, **self._options)
        # The copy waits for the device.
        self.logits = out.logits[0, -1].float().cpu()
        return time.perf_counter() - start

    def read_all(
        self,
        chunks: tuple[Tensor, ...],
        on_chunk: Callable[[int, float], None] = lambda tokens, seconds: None,
    ) -> list[float]:
        """Run chunks one after the other; returns the seconds of each."""
        seconds: list[float] = []
        tokens = 0
        for chunk in chunks:
            seconds.append(self.read(chunk))
            tokens += chunk.shape[1]
            on_chunk(tokens, seconds[-1])
        return seconds

    def write(self, max_new_tokens: int) -> list[int]:
        """Generate tokens greedily until the end token; returns them."""
        ends = self._model.config.get_text_config(decoder=True).eos_token_id
        ends = {ends} if isinstance(ends, int) else set(ends or ())
        new_tokens = [int(self.logits.argmax())]
        while len(new_tokens) < max_new_tokens and new_tokens[-1] not in ends:
            self.read(torch.tensor([[new_tokens[-1]]], device=self._model.device))
            new_tokens.append(int(self.logits.argmax()))
        return new_tokens
