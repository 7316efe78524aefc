"""The authors' operator as an attention processor, from a user's own checkout of their code."""

import torch
from torch import Tensor

from benchmarks import upstream
from xattn_video import XAttnProcessor
from xattn_video.ops.blocks import BlockLists
from xattn_video.processors.recorder import ForwardPass


def authors_processor(threshold: float, stride: int) -> XAttnProcessor:
    """A processor with the authors' operator: video and valid text in one call, as in their code.

    All prompts must have the same length. The report has no density.
    """
    module = upstream.load()

    def operator(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        threshold: Tensor,
        forward: ForwardPass,
        blocks: BlockLists | None,
    ) -> tuple[Tensor, None]:
        length = forward.layout.key_lengths[0]
        attended = module.Xattention_prefill(
            *(tokens[:, :length].transpose(1, 2) for tokens in (query, key, value)),
            stride=stride,
            threshold=forward.decision.threshold,
            causal=False,
        )
        out = torch.zeros_like(value)
        out[:, :length] = attended.transpose(1, 2)
        return out, None

    processor = XAttnProcessor(threshold, stride=stride, warmup_steps=0, min_tokens=0)
    processor.operator = operator
    return processor
