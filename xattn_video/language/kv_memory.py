"""Plans the memory of a long prefill before anything is loaded."""

from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from xattn_video.language.model_sources import LanguageSource

_GIB = 2**30
# Tensors that a gated MLP holds at its peak: `[chunk, intermediate]` (gate, up and their product)
# and `[chunk, hidden]` (the residual, its normalised form and the output).
_MLP_TENSORS, _HIDDEN_TENSORS = 3, 3
# Tensors `[chunk, heads x head size]` of attention: queries, keys, values, rotated ones, output.
_ATTENTION_TENSORS = 6
# Tensors of 4 bytes a block: the scores, their sorted or summed copy, and the block lists.
_SCORE_TENSORS = 3
_SMALLEST_CHUNK = 1024


@dataclass(frozen=True, slots=True)
class PrefillPlan:
    """The memory of a prefill, in GiB; an estimate.

    Attributes:
        tokens: Tokens of the prompt.
        chunk_size: Tokens of a forward pass.
        dtype: Dtype of weights, keys and values.
        parameters: Number of the model's parameters.
        kv_kib_per_token: KiB of a token's keys and values in all layers that keep every token.
        weights, kv_cache: Memory of the weights, and of the keys and values.
        work: Memory that the forward pass of a chunk needs in addition.
    """

    tokens: int
    chunk_size: int
    dtype: str
    parameters: int
    kv_kib_per_token: float
    weights: float
    kv_cache: float
    work: float

    @property
    def peak(self) -> float:
        """The sum of weights, KV cache and work."""
        return self.weights + self.kv_cache + self.work

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {**asdict(self), "peak": self.peak}


def plan_prefill(
    source: LanguageSource,
    tokens: int,
    max_new_tokens: int,
    chunk_size: int,
    dtype: torch.dtype,
    block_size: int,
) -> PrefillPlan:
    """Estimate the memory that a prefill needs.

    Args:
        source: The model.
        tokens: Tokens of the prompt.
        max_new_tokens: Tokens of the answer.
        chunk_size: Tokens of a forward pass.
        dtype: Dtype of weights, keys and values.
        block_size: Tokens in a block.
    """
    config = source.text_config
    size = dtype.itemsize
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    key_heads = getattr(config, "num_key_value_heads", None) or heads
    of_layer = 2 * key_heads * head_dim * size
    total = tokens + max_new_tokens
    kept = _kept_tokens(config, total)
    full_layers = sum(number == total for number in kept)
    chunk = min(chunk_size, tokens)
    inner = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    mlp = _MLP_TENSORS * inner + _HIDDEN_TENSORS * config.hidden_size
    attention = _ATTENTION_TENSORS * heads * head_dim + _HIDDEN_TENSORS * config.hidden_size
    scores = 4 * _SCORE_TENSORS * heads * -(-chunk // block_size) * -(-total // block_size)
    parameters = source.count_parameters()
    return PrefillPlan(
        tokens,
        chunk_size,
        str(dtype).removeprefix("torch."),
        parameters,
        of_layer * full_layers / 1024,
        parameters * size / _GIB,
        of_layer * sum(kept) / _GIB,
        max(chunk * size * mlp, chunk * size * attention + scores) / _GIB,
    )


def describe_prefill_shortage(plan: PrefillPlan, free: float | None) -> str | None:
    """What does not fit and what would fit, in one line; None if it fits.

    Args:
        plan: The plan.
        free: The free memory of the device in GiB; with None the result is None.
    """
    if free is None or plan.peak <= free:
        return None
    text = (
        f"{plan.tokens:,} tokens need about {plan.peak:.1f} GiB ({_parts(plan)}), and "
        f"{free:.1f} GiB is free; "
    )
    chunk = plan.chunk_size // 2
    while chunk >= _SMALLEST_CHUNK:
        if _with_chunk(plan, chunk).peak <= free:
            return f"{text}--chunk-size {chunk} would fit."
        chunk //= 2
    room = free - plan.weights - plan.work
    fitting = int(room / plan.kv_cache * plan.tokens) if room > 0 else 0
    # Rounded down to whole chunks, if there are any.
    fitting -= fitting % (plan.chunk_size if fitting > plan.chunk_size else 1)
    if fitting:
        return f"{text}--tokens {fitting} would fit."
    halved = ", or --dtype bfloat16," if plan.dtype == "float32" else ""
    return f"{text}use a smaller model{halved} or a device with more."


def _parts(plan: PrefillPlan) -> str:
    return f"weights {plan.weights:.1f}, KV cache {plan.kv_cache:.1f}, a chunk {plan.work:.1f}"


def _with_chunk(plan: PrefillPlan, chunk: int) -> PrefillPlan:
    return replace(plan, work=plan.work * chunk / plan.chunk_size)


def _kept_tokens(config: Any, tokens: int) -> list[int]:
    """Tokens whose keys and values each layer keeps."""
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        kinds = ["sliding_attention" if window else "full_attention"] * config.num_hidden_layers
    limited = min(tokens, window or tokens)
    return [limited if kind == "sliding_attention" else tokens for kind in kinds]
