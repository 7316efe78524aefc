"""The attention processor used in training: no mask, and RoPE as one complex product.

All prompts of a batch have the same length, so no key is masked and the flash kernel can run.
"""

import torch
import torch.nn.functional as F
from diffusers import HunyuanVideoTransformer3DModel
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn


class TrainingProcessor:
    """Joint attention of video and text; set `rotation` for the batch before a forward pass."""

    def __init__(self) -> None:
        self.rotation: Tensor | None = None

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        num_video = hidden_states.shape[1]
        is_single = attn.add_q_proj is None
        if is_single:
            hidden_states = torch.cat([hidden_states, encoder_hidden_states], dim=1)
        query = _normed(attn.norm_q, _heads(attn.to_q(hidden_states), attn))
        key = _normed(attn.norm_k, _heads(attn.to_k(hidden_states), attn))
        value = _heads(attn.to_v(hidden_states), attn)
        text_query, text_key = query[:, num_video:], key[:, num_video:]
        if not is_single:
            text_query = _normed(
                attn.norm_added_q, _heads(attn.add_q_proj(encoder_hidden_states), attn)
            )
            text_key = _normed(
                attn.norm_added_k, _heads(attn.add_k_proj(encoder_hidden_states), attn)
            )
            text_value = _heads(attn.add_v_proj(encoder_hidden_states), attn)
            value = torch.cat([value, text_value], dim=1)
        query = torch.cat([self._rotate(query[:, :num_video]), text_query], dim=1)
        key = torch.cat([self._rotate(key[:, :num_video]), text_key], dim=1)
        output = F.scaled_dot_product_attention(
            query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
        )
        output = output.transpose(1, 2).flatten(2)
        video, text = output[:, :num_video], output[:, num_video:]
        if not is_single:
            video, text = attn.to_out[0](video), attn.to_add_out(text)
        return video, text

    def _rotate(self, x: Tensor) -> Tensor:
        assert self.rotation is not None
        pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
        return torch.view_as_real(pairs * self.rotation).flatten(-2).to(x.dtype)


def use_training_attention(transformer: HunyuanVideoTransformer3DModel) -> TrainingProcessor:
    """Set one `TrainingProcessor` on every joint block; the token refiner keeps its own."""
    processor = TrainingProcessor()
    for block in [*transformer.transformer_blocks, *transformer.single_transformer_blocks]:
        block.attn.set_processor(processor)
    return processor


def rotation_of(transformer: HunyuanVideoTransformer3DModel, latents: Tensor) -> Tensor:
    """RoPE of the grid of ``latents`` as complex factors ``[1, video tokens, 1, D / 2]``."""
    cosine, sine = transformer.rope(latents)
    return torch.complex(cosine[:, ::2].float(), sine[:, ::2].float())[None, :, None, :]


def _heads(x: Tensor, attn: Attention) -> Tensor:
    return x.unflatten(2, (attn.heads, -1))


def _normed(norm: nn.Module, x: Tensor) -> Tensor:
    return F.rms_norm(x, (x.shape[-1],), norm.weight, norm.eps)
