"""The authors' published call `Xattention_prefill`, for code that uses it."""

import math
from numbers import Real

import torch
from torch import Tensor

from xattn_video.ops.arguments import (
    check_block_size,
    check_flag,
    check_thresholds,
    check_triple,
)
from xattn_video.ops.attention import run_attend
from xattn_video.ops.blocks import BlockLists, diagonal_blocks, fewest_blocks, sink_blocks
from xattn_video.ops.problem import AttentionInputs, Problem
from xattn_video.ops.scoring import (
    ScoringInputs,
    torch_block_scores,
    triton_block_scores,
    triton_unsupported_reasons,
)


def Xattention_prefill(  # noqa: N802  (the published name)
    query_states: Tensor,
    key_states: Tensor,
    value_states: Tensor,
    stride: int,
    norm: float = 1,
    threshold: float | Tensor = 0.8,
    block_size: int = 128,
    use_triton: bool | None = None,
    causal: bool = True,
    kdb: int = 1,
    chunk_size: int | None = None,
    keep_sink: bool = False,
    keep_recent: bool = False,
) -> Tensor:
    """Attention over the blocks that XAttention selects, with the published argument names.

    Padded keys receive no mass, so ``chunk_size`` bounds memory and never changes the result.

    Args:
        query_states: `[B, H, Sq, D]`.
        key_states: `[B, Hkv, Sk, D]`, Hkv dividing H.
        value_states: `[B, Hkv, Sk, D]`.
        stride: Tokens in a group of the estimate; divides ``block_size``.
        norm: Divides the estimate's softmax scale.
        threshold: Share of each row's estimated mass to keep: a number, or a tensor `[H]` with
            one value per query head. With more dimensions it is used as in `select_blocks`.
        block_size: Tokens in a block.
        use_triton: Score with the Triton kernel (True) or in torch (False); None takes the kernel
            on a GPU where it can run.
        causal: Query t sees keys up to t + Sk - Sq; the diagonal and key block 0 are kept.
        kdb: Only 1.
        chunk_size: The most query tokens whose group matrix may be in memory at once, a multiple
            of ``block_size``; None chooses a bound for the device. The Triton kernel keeps no
            such matrix and meets any bound.
        keep_sink: Keep key block 0 in every row; causal calls always do.
        keep_recent: Keep the diagonal block of every row; causal calls always do.

    Returns:
        `[B, H, Sq, D]`.

    Raises:
        ValueError, TypeError: An argument is of a wrong type, out of range or cannot be honoured.
    """
    check_triple(query_states, key_states, value_states, causal, suffix="_states")
    check_block_size(block_size, stride)
    _check_options(norm, kdb, chunk_size, block_size)
    scale = query_states.shape[-1] ** -0.5
    scoring = ScoringInputs(
        query_states, key_states, block_size, stride, causal, None, scale / norm
    )
    forced = _forced(scoring, keep_sink, keep_recent)
    scores = _scores(scoring, use_triton, chunk_size)
    tau = check_thresholds(_by_head(threshold, query_states), scores.shape[:-1], scores.device)
    blocks = BlockLists.from_mask(fewest_blocks(scores, tau, forced.expand_as(scores)))
    inputs = AttentionInputs(
        query_states, key_states, value_states, blocks, block_size, causal, None, scale
    )
    return run_attend(inputs, "auto")[0]


def _forced(inputs: ScoringInputs, keep_sink: bool, keep_recent: bool) -> Tensor:
    """The blocks kept at any score, bool, broadcastable to the scores."""
    check_flag("keep_sink", keep_sink)
    check_flag("keep_recent", keep_recent)
    Sq, Sk, device = inputs.query.shape[2], inputs.key.shape[2], inputs.query.device
    forced = torch.zeros((), dtype=torch.bool, device=device)
    if inputs.causal or keep_sink:
        forced = forced | sink_blocks(Sk, block_size=inputs.block_size, device=device)
    if inputs.causal or keep_recent:
        forced = forced | diagonal_blocks(Sq, Sk, block_size=inputs.block_size, device=device)
    return forced


def _by_head(threshold: float | Tensor, query: Tensor) -> float | Tensor:
    """Turn `[H]` into `[H, 1]`; otherwise the last dimension would mean rows of blocks."""
    if not isinstance(threshold, Tensor) or threshold.dim() != 1:
        return threshold
    if threshold.shape[0] != query.shape[1]:
        raise ValueError(
            f"threshold must be a number or hold one for each query head, [{query.shape[1]}], got "
            f"{list(threshold.shape)}."
        )
    return threshold[:, None]


def _check_options(norm: float, kdb: int, chunk_size: int | None, block_size: int) -> None:
    if kdb != 1:
        raise ValueError(f"kdb must be 1, got {kdb!r}: larger key steps are not supported.")
    if isinstance(norm, bool) or not isinstance(norm, Real):
        raise TypeError(f"norm must be a number, got {norm!r}; 1 leaves the scale unchanged.")
    if chunk_size is not None and (
        isinstance(chunk_size, bool) or not isinstance(chunk_size, int)
    ):
        raise TypeError(f"chunk_size must be an int of tokens or None, got {chunk_size!r}.")
    if not 0 < norm < math.inf:
        raise ValueError(
            f"norm must be positive and finite, got {norm}; 1 leaves the scale unchanged."
        )
    if chunk_size is not None and (chunk_size < 1 or chunk_size % block_size):
        raise ValueError(
            f"chunk_size must be a multiple of block_size={block_size}, got {chunk_size}."
        )


def _scores(inputs: ScoringInputs, use_triton: bool | None, chunk_size: int | None) -> Tensor:
    """`block_scores`, with the kernel or in torch as ``use_triton`` says."""
    if use_triton is not None:
        check_flag("use_triton", use_triton)
    query = inputs.query
    problem = Problem(query.device, query.dtype, query.shape[-1], inputs.block_size)
    reasons = triton_unsupported_reasons(problem, inputs.stride)
    if use_triton and reasons:
        raise ValueError(
            f"use_triton=True cannot be honoured: {' '.join(reasons)} Or pass use_triton=False."
        )
    if use_triton is None:
        use_triton = query.is_cuda and not reasons
    if use_triton:
        return triton_block_scores(inputs)
    return torch_block_scores(inputs, chunk_size)
