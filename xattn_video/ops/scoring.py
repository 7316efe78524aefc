"""Antidiagonal block scores (XAttention, arXiv:2503.16428, section 2.1)."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from xattn_video.ops.arguments import (
    check_block_size,
    check_key_lengths,
    check_name,
    check_pair,
    check_scale,
)
from xattn_video.ops.problem import Problem

Precision: TypeAlias = Literal["auto", "exact", "float8"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)

# The cost of rounding to 8 bits grows with the tokens, and the gain with their square: on an H100
# it is slower at 17,429 tokens and faster at 119,056.
_FLOAT8_PAYS_FROM = 65536

# Elements of one chunk of the group matrix on the torch path. On a CPU 4 MiB of float32 stay in
# the caches; a GPU wants large products.
_CHUNK_ELEMENTS = {"cpu": 1 << 20}
_DEFAULT_CHUNK_ELEMENTS = 1 << 24


@dataclass(frozen=True, slots=True)
class ScoringInputs:
    """The checked inputs of scoring.

    query is `[B, H, Sq, D]`, key `[B, Hkv, Sk, D]`; key_lengths is int32 `[B]` on the same
    device, or None where all Sk keys are valid.
    """

    query: Tensor
    key: Tensor
    block_size: int
    stride: int
    causal: bool
    key_lengths: Tensor | None
    scale: float
    precision: Precision = "auto"


def block_scores(
    query: Tensor,
    key: Tensor,
    *,
    block_size: int = 128,
    stride: int = 8,
    causal: bool = False,
    key_lengths: Tensor | Sequence[int] | None = None,
    scale: float | None = None,
    precision: Precision = "exact",
) -> Tensor:
    """Estimate the softmax mass of every block of the attention matrix from its antidiagonals.

    Groups of ``stride`` consecutive tokens are compared by pairing the tokens of the query group,
    in reverse, with those of the key group: one antidiagonal of each stride x stride tile. A
    softmax over the key groups gives their mass, which is summed over the groups of a block.

    Args:
        query: `[B, H, Sq, D]`, any strides.
        key: `[B, Hkv, Sk, D]`, same dtype and device. Hkv divides H: each key head serves
            H / Hkv consecutive query heads. Scores are per query head.
        block_size: Tokens in a block.
        stride: Tokens in a group; divides ``block_size``.
        causal: Query t sees keys up to t + Sk - Sq.
        key_lengths: int `[B]`, valid keys of each item, 1 to Sk. Keys beyond receive no mass. It
            is copied to the query's device. Values on the CPU are checked; values on another
            device are clamped, without a host synchronisation.
        scale: Softmax scale, 1 / sqrt(D) if None.
        precision: ``"exact"`` multiplies query and key as they are. ``"float8"`` first rounds them
            to 8 bits (e4m3, one scale for each group of tokens), which is faster; the scores are
            then off by a few percent. It needs the Triton kernel and compute capability 8.9 or
            more. ``"auto"`` uses 8 bits where they were measured to be faster (on Hopper from
            65,536 tokens on) and exact scores elsewhere.

    Returns:
        float32 `[B, H, Nq, Nk]`, Nq = ceil(Sq / block_size). Every row sums to 1. A block scores 0
        if and only if it holds no valid key: smaller masses are raised to the smallest
        normal float32. NaN or inf in the inputs makes the valid blocks of the rows they reach NaN.

    Raises:
        ValueError, TypeError: An argument is out of range or of a wrong type, shapes, dtypes or
            devices disagree, or 8-bit scores are not available here.
    """
    check_pair(query, key, causal)
    check_block_size(block_size, stride)
    check_name("precision", precision)
    return compute_scores(
        ScoringInputs(
            query,
            key,
            block_size,
            stride,
            causal,
            check_key_lengths(key_lengths, query, key),
            check_scale(scale, query),
            precision,
        )
    )


def compute_scores(inputs: ScoringInputs) -> Tensor:
    """`block_scores` for checked inputs."""
    query, key = inputs.query, inputs.key
    scorer = _choose_scorer(
        query.device,
        query.dtype,
        query.shape[-1],
        inputs.block_size,
        inputs.stride,
        inputs.precision,
        min(query.shape[2], key.shape[2]),
    )
    if scorer == "torch":
        return torch_block_scores(inputs)
    return triton_block_scores(inputs, float8=scorer == "float8")


# Cached, because every layer of every step calls it.
@functools.lru_cache(maxsize=256)
def _choose_scorer(
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    block_size: int,
    stride: int,
    precision: Precision,
    tokens: int,
) -> Literal["torch", "triton", "float8"]:
    """Which function computes the scores; raises ValueError if the precision is unavailable."""
    problem = Problem(device, dtype, head_dim, block_size)
    check_precision(precision, problem, stride)
    if chosen_precision(precision, problem, stride, tokens) == "float8":
        return "float8"
    on_kernel = device.type == "cuda" and not triton_unsupported_reasons(problem, stride)
    return "triton" if on_kernel else "torch"


def check_precision(precision: str, problem: Problem | None = None, stride: int = 8) -> None:
    """Check that the precision is known and, given a problem, that it is available for it.

    Raises:
        ValueError: The precision is unknown, or the problem cannot have 8-bit scores.
    """
    if precision not in PRECISIONS:
        raise ValueError(
            f'scoring precision must be "auto", "exact" or "float8", got {precision!r}.'
        )
    if precision != "float8" or problem is None:
        return
    reasons = triton_unsupported_reasons(problem, stride, float8=True)
    if reasons:
        raise ValueError(
            f'scoring precision "float8" is not available: {" ".join(reasons)} Or use "exact".'
        )


def chosen_precision(
    precision: Precision, problem: Problem, stride: int, tokens: int
) -> Precision:
    """The precision that "auto" chooses for these inputs; another precision is returned as is."""
    if precision != "auto":
        return precision
    return "float8" if _float8_pays(problem, stride, tokens) else "exact"


def _float8_pays(problem: Problem, stride: int, tokens: int) -> bool:
    """Whether 8-bit scores are available and were measured to be faster."""
    if (
        tokens < _FLOAT8_PAYS_FROM
        or problem.dtype == torch.float32
        or problem.device.type != "cuda"
    ):
        return False
    if triton_unsupported_reasons(problem, stride, float8=True):
        return False
    from xattn_video.kernels.support import nvidia_capability

    return nvidia_capability(problem.device) == (9, 0)


def triton_unsupported_reasons(
    problem: Problem, stride: int, *, float8: bool = False
) -> list[str]:
    """Why the Triton kernel cannot score the problem, each reason with its remedy."""
    try:
        from xattn_video.kernels import antidiagonal_scores
    except ImportError:
        return ["triton is not installed; pip install triton."]
    return antidiagonal_scores.unsupported_reasons(
        problem.device, problem.dtype, problem.head_dim, problem.block_size, stride, float8=float8
    )


def triton_block_scores(inputs: ScoringInputs, *, float8: bool = False) -> Tensor:
    """`block_scores` with the fused kernel, which keeps no group matrix in memory."""
    from xattn_video.kernels.antidiagonal_scores import antidiagonal_scores

    return antidiagonal_scores(
        inputs.query,
        inputs.key,
        block_size=inputs.block_size,
        stride=inputs.stride,
        causal=inputs.causal,
        key_lengths=inputs.key_lengths,
        scale=inputs.scale,
        float8=float8,
    )


def torch_block_scores(inputs: ScoringInputs, chunk_size: int | None = None) -> Tensor:
    """`block_scores` in plain torch, ``chunk_size`` query tokens at a time: runs anywhere."""
    query, key, key_lengths = inputs.query, inputs.key, inputs.key_lengths
    block_size, stride = inputs.block_size, inputs.stride
    B, H, Sq, _ = query.shape
    Sk = key.shape[2]
    device = query.device
    groups_per_block = block_size // stride
    num_query_groups, num_key_groups = -(-Sq // stride), -(-Sk // stride)
    num_query_blocks, num_key_blocks = -(-Sq // block_size), -(-Sk // block_size)

    query_groups = _group_tokens(query, stride, None).flip(3).flatten(3)
    # [B, Hkv, S * D, Gk]
    key_groups = _group_tokens(key, stride, key_lengths).flatten(3).float().mT
    first_keys = torch.arange(num_key_groups, device=device) * stride
    # [B, 1, 1, Gk] or [1, 1, 1, Gk]
    lengths = torch.full((1,), Sk, device=device) if key_lengths is None else key_lengths
    valid = (first_keys < lengths[:, None])[:, None, None]

    if chunk_size is None:
        elements = _CHUNK_ELEMENTS.get(device.type, _DEFAULT_CHUNK_ELEMENTS)
        chunk_size = elements // (B * H * num_key_groups) * stride
    chunk_blocks = max(1, chunk_size // block_size)
    scores = query.new_empty(B, H, num_query_blocks, num_key_blocks, dtype=torch.float32)
    for first_block in range(0, num_query_blocks, chunk_blocks):
        start = first_block * groups_per_block
        stop = min(start + chunk_blocks * groups_per_block, num_query_groups)
        # Key groups that a query of the chunk may see.
        seen = num_key_groups
        if inputs.causal:
            seen = -(-(min(stop * stride, Sq) + Sk - Sq) // stride)
        # [B, H, chunk of Gq, seen]
        logits = _multiply_heads(query_groups[:, :, start:stop].float(), key_groups[..., :seen])
        logits.mul_(inputs.scale / stride)
        visible = valid[..., :seen]
        if inputs.causal:
            last_queries = torch.arange(start + 1, stop + 1, device=device) * stride
            last_queries = last_queries.clamp(max=Sq) - 1
            visible = visible & (first_keys[:seen] <= last_queries[:, None] + Sk - Sq)
        mass = logits.masked_fill_(~visible, float("-inf")).softmax(dim=-1)
        block_mass = _sum_blocks(mass, groups_per_block)
        block_visible = _sum_blocks(visible.float(), groups_per_block) > 0
        block_mass.clamp_(min=torch.finfo(torch.float32).tiny)
        rows = slice(first_block, first_block + block_mass.shape[2])
        columns = block_mass.shape[3]
        scores[:, :, rows, :columns] = block_mass.where(block_visible, 0.0)
        scores[:, :, rows, columns:] = 0
    return scores


def _group_tokens(tokens: Tensor, stride: int, lengths: Tensor | None) -> Tensor:
    """`[B, H, S, D]` -> `[B, H, G, stride, D]`; a cut group repeats its last valid token."""
    B, H, S, D = tokens.shape
    num_groups = -(-S // stride)
    if lengths is not None:
        index = torch.arange(num_groups * stride, device=tokens.device).expand(B, -1)
        index = index.minimum(lengths[:, None].to(index.dtype) - 1)
        tokens = tokens.gather(2, index[:, None, :, None].expand(B, H, -1, D))
    elif num_groups * stride != S:
        last = tokens[:, :, -1:].expand(-1, -1, num_groups * stride - S, -1)
        tokens = torch.cat([tokens, last], dim=2)
    return tokens.unflatten(2, (num_groups, stride))


def _multiply_heads(query_groups: Tensor, key_groups: Tensor) -> Tensor:
    """`[B, H, M, K]` x `[B, Hkv, K, N]` -> `[B, H, M, N]`, without repeating key heads."""
    heads = key_groups.shape[1]
    # The query heads of one key head are stacked as rows, so that no key is copied.
    rows = query_groups.unflatten(1, (heads, -1)).flatten(2, 3)
    return (rows @ key_groups).unflatten(2, (-1, query_groups.shape[2])).flatten(1, 2)


def _sum_blocks(mass: Tensor, groups_per_block: int) -> Tensor:
    """Mass of groups `[..., Gq, Gk]` -> mass of blocks `[..., Nq, Nk]`: a mean over query groups.

    A mask that has one row for all query groups keeps one row.
    """
    num_query_groups, num_key_groups = mass.shape[-2:]
    missing_keys = -num_key_groups % groups_per_block
    if missing_keys:
        mass = F.pad(mass, (0, missing_keys))
    mass = mass.unflatten(-1, (-1, groups_per_block)).sum(-1)
    if num_query_groups == 1:
        return mass
    whole = num_query_groups // groups_per_block * groups_per_block
    rows = [mass[..., :whole, :].unflatten(-2, (-1, groups_per_block)).mean(-2)]
    if whole < num_query_groups:
        rows.append(mass[..., whole:, :].mean(-2, keepdim=True))
    return torch.cat(rows, dim=-2)
