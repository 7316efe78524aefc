"""Checks another package's kernel against the formula before its results are used."""

from collections.abc import Callable

import torch
from torch import Tensor

from xattn_video.errors import BackendUnavailableError
from xattn_video.ops.blocks import BlockLists
from xattn_video.ops.problem import AttentionInputs, Problem

# bfloat16 errors are ten times smaller; dense attention in place of sparse is far above.
_LARGEST_RELATIVE_ERROR = 0.02
_BLOCK_SIZE = 128
_LENGTH = 300
# Keys of the causal problem; with these its diagonal cuts two key blocks in a row of blocks.
_CAUSAL_KEY_LENGTH = 470


def check_on_small_problem(
    name: str,
    attend: Callable[[AttentionInputs], tuple[Tensor, Tensor | None]],
    kind: Problem,
    *,
    remedy: str,
    grouped: bool = False,
) -> None:
    """Run a backend's kernel on a small ragged problem of a kind, in blocks of 128.

    Args:
        name: The backend.
        attend: Its attention; a returned log-sum-exp is checked too. The query is
            `[1, 2, 300, D]`; key and value are `[1, 2, 300, D]`, with 470 tokens if causal and
            one head if grouped.
        kind: Device, dtype, head size, and whether attention is causal.
        remedy: What to do if the check fails.
        grouped: Whether both query heads share one key head.

    Raises:
        BackendUnavailableError: The kernel ignores the blocks, or its result is wrong.
    """
    inputs = _small_problem(kind, grouped)
    found, found_lse = attend(inputs)
    expected, expected_lse = _formula(inputs, inputs.blocks.to_mask())
    errors = [_relative_error(found, expected)]
    if found_lse is not None:
        sees = expected_lse.isfinite()
        agree = torch.equal(found_lse.isneginf(), ~sees)
        errors.append(_relative_error(found_lse[sees], expected_lse[sees]) if agree else torch.inf)
    # The maximum is NaN if one of them is.
    error = torch.tensor(errors).max().item()
    if error <= _LARGEST_RELATIVE_ERROR:
        return
    dense, _ = _formula(inputs, torch.ones_like(inputs.blocks.indices, dtype=torch.bool))
    is_dense = _relative_error(found, dense) <= _LARGEST_RELATIVE_ERROR
    what = "ignores the blocks and computes dense attention" if is_dense else "is wrong"
    raise BackendUnavailableError(
        name,
        [
            f"the installed kernel {what} on {kind.device} with {kind.dtype} and head_dim "
            f"{kind.head_dim}{' in causal attention' * kind.causal}"
            f"{' with grouped-query attention' * grouped} "
            f"(relative error {error:.2g} in a check on first use); {remedy}"
        ],
    )


def _small_problem(kind: Problem, grouped: bool) -> AttentionInputs:
    """Random inputs with a cut last block; rows keep it, do not keep it, or keep no block."""
    rows = [[[1, 0, 1], [0, 1, 0], [0, 0, 1]], [[0, 1, 1], [0, 0, 0], [1, 0, 0]]]
    key_length = _LENGTH
    if kind.causal:
        # Rows keep both blocks that the diagonal cuts, one, none, or a hidden one.
        rows = [[[1, 1, 1, 1], [0, 1, 0, 1], [1, 0, 1, 1]], [[1, 0, 1, 0], [0] * 4, [0, 1, 0, 0]]]
        key_length = _CAUSAL_KEY_LENGTH
    mask = torch.tensor(rows, device=kind.device).bool()[None]
    # The generator needs CPU tensors, whatever the default device is.
    generator = torch.Generator("cpu").manual_seed(0)
    tensors = torch.randn(3, 1, 2, key_length, kind.head_dim, generator=generator, device="cpu")
    query, key, value = tensors.to(kind.device, kind.dtype)
    if grouped:
        key, value = key[:, :1], value[:, :1]
    return AttentionInputs(
        query[:, :, :_LENGTH],
        key,
        value,
        BlockLists.from_mask(mask),
        _BLOCK_SIZE,
        kind.causal,
        None,
        kind.head_dim**-0.5,
    )


def _formula(inputs: AttentionInputs, block_mask: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over the blocks of the mask in float32, and its log-sum-exp."""
    query, key, value = (
        tensor.float().expand(1, 2, -1, -1) for tensor in (inputs.query, inputs.key, inputs.value)
    )
    visible = block_mask.repeat_interleave(_BLOCK_SIZE, 2).repeat_interleave(_BLOCK_SIZE, 3)
    visible = visible[:, :, : query.shape[2], : key.shape[2]]
    if inputs.causal:
        visible = visible.tril(key.shape[2] - query.shape[2])
    logits = (query @ key.mT * inputs.scale).masked_fill(~visible, float("-inf"))
    return logits.softmax(dim=-1).nan_to_num(0.0) @ value, logits.logsumexp(dim=-1)


def _relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found.float() - expected).norm() / expected.norm())
