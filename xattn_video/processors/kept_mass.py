"""An XAttention processor that also measures what share of the true softmax its blocks hold."""

from typing import Any

import torch
from torch import Tensor

from xattn_video.ops.selection import select
from xattn_video.processors.hunyuan_video import XAttnProcessor
from xattn_video.processors.layer_slots import ForwardPlan, LayerSlot

_SAMPLED_ROWS = 32


class KeptMassProcessor(XAttnProcessor):
    """Kept mass: the softmax mass, over all valid keys, that lies in the computed blocks.

    It is measured after every sparse layer on some rows of video tokens, drawn anew each time from
    a fixed seed. Every sparse layer selects its blocks twice, so time nothing with it.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._masses: list[Tensor] = []
        self._generator = torch.Generator().manual_seed(0)

    def __getstate__(self) -> dict[str, Any]:
        # A generator cannot be copied, and what was measured is not the copy's.
        generator = torch.Generator().manual_seed(0)
        return {**super().__getstate__(), "_masses": [], "_generator": generator}

    @property
    def kept_mass(self) -> list[float] | None:
        """For each item of the batch, the mean over layers, heads and rows; waits for the device.

        None if nothing ran sparse.
        """
        if not self._masses:
            return None
        means: list[float] = (
            torch.stack([mass.cpu() for mass in self._masses]).mean(dim=0).tolist()
        )
        return means

    def _attend(
        self,
        slot: LayerSlot,
        plan: ForwardPlan,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        num_text_tokens: int,
    ) -> Tensor:
        out = super()._attend(slot, plan, query, key, value, attention_mask, num_text_tokens)
        if slot.state != "sparse":
            return out
        assert slot.threshold is not None
        query, key = query.to(value.dtype), key.to(value.dtype)
        longest = int(plan.key_lengths.max())
        num_video_tokens = query.shape[1] - num_text_tokens
        has_one_length = bool((plan.key_lengths == longest).all())
        blocks = select(
            query.transpose(1, 2),
            key[:, :longest].transpose(1, 2),
            threshold=slot.threshold,
            stride=self.settings.stride,
            block_size=self.settings.block_size,
            num_text_tokens=longest - num_video_tokens,
            key_lengths=None if has_one_length else plan.device_key_lengths,
            scoring_precision=self.settings.scoring_precision,
        )
        rows = torch.randint(num_video_tokens, (_SAMPLED_ROWS,), generator=self._generator)
        masses = kept_mass(
            query,
            key[:, :longest],
            blocks.to_mask(),
            plan.device_key_lengths,
            rows.to(query.device),
            self.settings.block_size,
        )
        self._masses.append(masses.mean(dim=(1, 2)))
        return out


def kept_mass(
    query: Tensor,
    key: Tensor,
    block_mask: Tensor,
    key_lengths: Tensor,
    rows: Tensor,
    block_size: int,
) -> Tensor:
    """Softmax mass of the kept blocks in some rows, float32 `[B, H, R]`.

    Args:
        query: `[B, Sq, H, D]`.
        key: `[B, Sk, H, D]`, the valid ones first.
        block_mask: bool `[B, H, Nq, Nk]`.
        key_lengths: int64 `[B]`, valid keys of each item.
        rows: int64 `[R]`, query tokens.
        block_size: Tokens in a block.
    """
    q = query[:, rows].transpose(1, 2).float() * query.shape[-1] ** -0.5
    logits = q @ key.transpose(1, 2).transpose(2, 3).float()
    columns = torch.arange(key.shape[1], device=query.device)
    beyond = columns >= key_lengths[:, None]
    weights = logits.masked_fill(beyond[:, None, None], -torch.inf).softmax(dim=-1)
    kept = block_mask[:, :, rows // block_size][..., columns // block_size]
    return (weights * kept).sum(dim=-1)
