"""Plans the memory of a long prefill before anything is loaded."""

from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from transformers import StaticCache

from xattn_video.errors import UnsupportedModelError
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

    Raises:
        UnsupportedModelError: Its layers have no static cache.
    """
    config = source.text_config
    parameters = source.count_parameters()
    size = dtype.itemsize
    total = tokens + max_new_tokens
    # (tokens that it keeps, bytes of keys and values of a token) of each layer.
    layers = [
        (kept, size * of_layer)
        for kept, of_layer in zip(_kept_tokens(config, total), _key_sizes(config), strict=False)
    ]
    chunk = min(chunk_size, tokens)
    heads = config.num_attention_heads
    widest = max(head_dim(layer) for layer in _layer_configs(config))
    mlp = _MLP_TENSORS * _inner_size(config) + _HIDDEN_TENSORS * config.hidden_size
    attention = _ATTENTION_TENSORS * heads * widest + _HIDDEN_TENSORS * config.hidden_size
    scores = 4 * _SCORE_TENSORS * heads * -(-chunk // block_size) * -(-total // block_size)
    return PrefillPlan(
        tokens,
        chunk_size,
        str(dtype).removeprefix("torch."),
        parameters,
        sum(of_token for kept, of_token in layers if kept == total) / 1024,
        parameters * size / _GIB,
        sum(kept * of_token for kept, of_token in layers) / _GIB,
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
        # A chunk with room for the whole prompt changes nothing.
        if chunk < plan.tokens and _with_chunk(plan, chunk).peak <= free:
            return f"{text}--chunk-size {chunk} would fit."
        chunk //= 2
    room = free - plan.weights - plan.work
    fitting = int(room / plan.kv_cache * plan.tokens) if room > 0 else 0
    # Rounded down to whole chunks, if there are any.
    fitting -= fitting % (plan.chunk_size if fitting > plan.chunk_size else 1)
    if fitting:
        return f"{text}--tokens {fitting} would fit."
    is_enough = plan.dtype == "float32" and plan.peak / 2 <= free
    halved = ", or --dtype bfloat16," if is_enough else ""
    return f"{text}use a smaller model{halved} or a device with more."


def _parts(plan: PrefillPlan) -> str:
    return f"weights {plan.weights:.1f}, KV cache {plan.kv_cache:.1f}, a chunk {plan.work:.1f}"


def _with_chunk(plan: PrefillPlan, chunk: int) -> PrefillPlan:
    return replace(plan, work=plan.work * chunk / min(plan.chunk_size, plan.tokens))


def _kept_tokens(config: Any, tokens: int) -> list[int]:
    """Tokens whose keys and values each layer keeps; layers at the end that keep none may lack."""
    # The cache of the run, before it allocates. Linear and shared layers have no such length.
    try:
        layers = StaticCache(config=config, max_cache_len=tokens).layers
    except KeyError as error:
        raise UnsupportedModelError(
            f"transformers has no static cache for layers of kind {error}, as in "
            f"{config.model_type}; use a model with full or sliding attention."
        ) from None
    return [getattr(layer, "max_cache_len", 0) for layer in layers]


def _key_sizes(config: Any) -> list[int]:
    """Numbers in the keys and values of a token, in each layer."""
    return [2 * _key_heads(layer) * head_dim(layer) for layer in _layer_configs(config)]


def _layer_configs(config: Any) -> list[Any]:
    """The configuration of each layer, which in some models differ in the size of a head."""
    # None in older versions of transformers where all layers are the same.
    return list(config.per_layer_config or [config] * config.num_hidden_layers)


def _key_heads(config: Any) -> int:
    """Heads of the keys, and of the values."""
    # Falcon's later architecture has several, whatever multi_query says.
    if getattr(config, "multi_query", False) and not getattr(
        config, "new_decoder_architecture", False
    ):
        return 1
    heads: int = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return heads


def head_dim(config: Any) -> int:
    """Size of a head."""
    size: int = getattr(config, "head_dim", None) or (
        config.hidden_size // config.num_attention_heads
    )
    return size


def _inner_size(config: Any) -> int:
    """Width of the widest MLP; some models list the width of each layer."""
    inner = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    return inner if isinstance(inner, int) else max(inner)
