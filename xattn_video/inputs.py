"""What an attention backend is given: the problem (no tensors) and the inputs (tensors)."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Problem:
    """An attention problem without its tensors: all that decides which backend can run it."""

    device: torch.device
    dtype: torch.dtype
    head_dim: int
    block_size: int
    causal: bool = False
    ragged: bool = False
    """True where the items of a batch have key lengths of their own."""


@dataclass(frozen=True, slots=True)
class AttentionInputs:
    """The checked arguments of `block_sparse_attention`.

    query is `[B, H, Sq, D]`, key and value `[B, H, Sk, D]`, any strides with the last one 1;
    block_mask is bool `[B, H, Nq, Nk]`, True = compute; key_lengths is int32 `[B]` on the same
    device, or None where all Sk keys are valid.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    block_mask: Tensor
    block_size: int
    causal: bool
    key_lengths: Tensor | None
    scale: float

    @property
    def problem(self) -> Problem:
        return Problem(
            device=self.query.device,
            dtype=self.query.dtype,
            head_dim=self.query.shape[-1],
            block_size=self.block_size,
            causal=self.causal,
            ragged=self.key_lengths is not None,
        )


def block_lists(block_mask: Tensor) -> tuple[Tensor, Tensor]:
    """Turn a block mask into the lists that kernels walk, without a host synchronisation.

    Args:
        block_mask: bool `[B, H, Nq, Nk]`, True = compute.

    Returns:
        counts, int32 `[B, H, Nq]`: kept blocks of each row; and indices, int32 `[B, H, Nq, Nk]`:
        the kept blocks first, ascending, then the others, ascending.
    """
    counts = block_mask.sum(dim=-1, dtype=torch.int32)
    indices = torch.argsort(~block_mask, dim=-1, stable=True).to(torch.int32)
    return counts, indices


def empty_output(query: Tensor) -> Tensor:
    """An uninitialised `[B, H, Sq, D]`, stored `[B, Sq, H, D]` as Diffusers wants it."""
    B, H, Sq, D = query.shape
    return query.new_empty(B, Sq, H, D).transpose(1, 2)
