"""The input of an attention backend: the problem (no tensors) and the tensors."""

from dataclasses import dataclass

import torch
from torch import Tensor

from xattn_video.ops.blocks import BlockLists


@dataclass(frozen=True, slots=True)
class Problem:
    """An attention problem without its tensors: everything that decides which backend can run."""

    device: torch.device
    dtype: torch.dtype
    head_dim: int
    block_size: int
    causal: bool = False
    ragged: bool = False
    """True if the items of a batch have different key lengths."""
    lse: bool = False
    """True if the log-sum-exp is requested."""


@dataclass(frozen=True, slots=True)
class AttentionInputs:
    """The checked inputs of a backend.

    query is `[B, H, Sq, D]`, key and value `[B, Hkv, Sk, D]`; the last stride is 1, the others are
    free. Query head h uses key head h // (H / Hkv). blocks are the key blocks to compute.
    key_lengths is int32 `[B]` on the same device, or None where all Sk keys are valid.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    blocks: BlockLists
    block_size: int
    causal: bool
    key_lengths: Tensor | None
    scale: float

    @property
    def grouped(self) -> bool:
        """Whether a key head serves several query heads."""
        return self.key.shape[1] != self.query.shape[1]

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


def empty_output(query: Tensor) -> Tensor:
    """An uninitialised `[B, H, Sq, D]`, stored `[B, Sq, H, D]` as Diffusers wants it."""
    B, H, Sq, D = query.shape
    return query.new_empty(B, Sq, H, D).transpose(1, 2)
