"""The authors' operator as an attention processor, from a user's own checkout of their code."""

import torch
from torch import Tensor

from benchmarks import upstream
from xattn_video import XAttnProcessor
from xattn_video.processors.layer_slots import ForwardPlan, LayerSlot


class AuthorsProcessor(XAttnProcessor):
    """Every layer by the authors' operator: video and valid text in one call, as their code does.

    For prompts of one length. Its report says nothing of the density.
    """

    def __init__(self, threshold: float, stride: int) -> None:
        super().__init__(threshold, stride=stride, warmup_steps=0)
        self._module = upstream.load()

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
        length = int(plan.key_lengths[0])
        attended = self._module.Xattention_prefill(
            *(
                tokens[:, :length].to(value.dtype).transpose(1, 2)
                for tokens in (query, key, value)
            ),
            stride=self.settings.stride,
            threshold=plan.threshold,
            causal=False,
        )
        out = torch.zeros_like(value)
        out[:, :length] = attended.transpose(1, 2)
        return out
