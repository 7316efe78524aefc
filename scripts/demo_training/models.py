"""The demo model's parts, built from Diffusers' and Transformers' own classes."""

import json
import random
from dataclasses import dataclass

import torch
from diffusers import AutoencoderKLHunyuanVideo, HunyuanVideoTransformer3DModel
from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import DEFAULT_PROMPT_TEMPLATE
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers.trainers import BpeTrainer
from torch import Tensor, nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    LlamaConfig,
    LlamaModel,
    PreTrainedTokenizerFast,
)

from xattn_video.pipelines.demo.grammar import sample_scene

LATENT_CHANNELS = 8
# Tokens of the prompt template before the prompt; the pipeline cuts off exactly this many.
TEMPLATE_TOKENS: int = DEFAULT_PROMPT_TEMPLATE["crop_start"]
_LLAMA_SPECIAL = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<pad>",
)


@dataclass(frozen=True, slots=True)
class TextStack:
    """Both tokenizers and both text encoders."""

    tokenizer: PreTrainedTokenizerFast
    tokenizer_2: CLIPTokenizer
    text_encoder: LlamaModel
    text_encoder_2: CLIPTextModel

    def tokenize(self, prompts: list[str], device: torch.device) -> tuple[Tensor, Tensor]:
        """Token ids of prompts with the same token count, for both encoders."""
        texts = [DEFAULT_PROMPT_TEMPLATE["template"].format(prompt) for prompt in prompts]
        ids = torch.tensor(self.tokenizer(texts).input_ids, device=device)
        ids_2 = torch.tensor(self.tokenizer_2(prompts).input_ids, device=device)
        return ids, ids_2

    def encode(self, ids: Tensor, ids_2: Tensor) -> tuple[Tensor, Tensor]:
        """Prompt states and pooled states, computed as in the pipeline."""
        states = self.text_encoder(input_ids=ids, output_hidden_states=True).hidden_states[-3]
        return states[:, TEMPLATE_TOKENS:], self.text_encoder_2(ids_2).pooler_output


def build_vae() -> AutoencoderKLHunyuanVideo:
    """A small VAE that compresses 8 times in space and 4 times in time.

    It has normalisation groups of four channels, as HunyuanVideo's own VAE. With groups of two,
    the 16 channels before the last convolution would lose the colour of plain areas.
    """
    return AutoencoderKLHunyuanVideo(
        latent_channels=LATENT_CHANNELS,
        block_out_channels=(16, 16, 32, 64),
        layers_per_block=1,
        norm_num_groups=4,
        scaling_factor=1.0,
        mid_block_add_attention=False,
    )


def build_transformer(options: dict[str, object]) -> HunyuanVideoTransformer3DModel:
    """A small transformer whose blocks start as the identity."""
    transformer = HunyuanVideoTransformer3DModel(
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        patch_size=2,
        patch_size_t=1,
        guidance_embeds=True,
        text_embed_dim=128,
        pooled_projection_dim=64,
        **options,
    )
    zeroed = [transformer.norm_out.linear, transformer.proj_out]
    for block in transformer.transformer_blocks:
        zeroed += [block.norm1.linear, block.norm1_context.linear]
    zeroed += [block.norm.linear for block in transformer.single_transformer_blocks]
    for linear in zeroed:
        nn.init.zeros_(linear.weight)
        nn.init.zeros_(linear.bias)
    return transformer


def build_text_stack() -> TextStack:
    """Tokenizers made for the grammar, and small untrained text encoders."""
    rng = random.Random(1)
    prompts = [sample_scene(rng, 1 + index % 2).prompt for index in range(3000)]
    tokenizer = _llama_tokenizer(prompts)
    tokenizer_2, special = _clip_tokenizer(prompts)
    text_encoder = LlamaModel(
        LlamaConfig(
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=5,
            hidden_size=128,
            intermediate_size=256,
            num_attention_heads=4,
            num_hidden_layers=4,
            vocab_size=len(tokenizer),
            hidden_act="silu",
            max_position_embeddings=512,
            # Larger than in a deep model, because words must mix within two layers.
            initializer_range=0.08,
        )
    )
    nn.init.normal_(text_encoder.embed_tokens.weight, std=0.5)
    text_encoder_2 = CLIPTextModel(
        CLIPTextConfig(
            bos_token_id=special[0],
            eos_token_id=special[1],
            pad_token_id=special[1],
            hidden_size=64,
            intermediate_size=128,
            num_attention_heads=4,
            num_hidden_layers=2,
            vocab_size=special[1] + 1,
            hidden_act="gelu",
            projection_dim=64,
            max_position_embeddings=77,
        )
    )
    nn.init.normal_(text_encoder_2.get_input_embeddings().weight, std=0.2)
    stack = TextStack(tokenizer, tokenizer_2, text_encoder, text_encoder_2)
    _check_token_counts(stack, prompts)
    return stack


def _llama_tokenizer(prompts: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE trained on the template until each of its words is one token."""
    template = DEFAULT_PROMPT_TEMPLATE["template"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    corpus = [template.split("{}")[0]] * 50 + [template.format(prompt) for prompt in prompts]
    trainer = BpeTrainer(
        vocab_size=1200,
        special_tokens=list(_LLAMA_SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{_LLAMA_SPECIAL[0]} $A", special_tokens=[(_LLAMA_SPECIAL[0], 0)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=_LLAMA_SPECIAL[0],
        eos_token=_LLAMA_SPECIAL[1],
        pad_token="<pad>",
        model_max_length=4096,
        # The transformer uses the text mask as a count, so padding must come last.
        padding_side="right",
    )


def _clip_tokenizer(prompts: list[str]) -> tuple[CLIPTokenizer, tuple[int, int]]:
    """A CLIP tokenizer for the grammar, and its begin and end ids."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.WhitespaceSplit(),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trainer = BpeTrainer(
        vocab_size=700,
        end_of_word_suffix="</w>",
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator(prompts, trainer)
    stored = json.loads(tokenizer.to_str())["model"]["merges"]
    merges = [tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in stored]
    tokens = [*alphabet, *(letter + "</w>" for letter in alphabet), *(a + b for a, b in merges)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
    clip = CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=77)
    return clip, (vocabulary["<|startoftext|>"], vocabulary["<|endoftext|>"])


def _check_token_counts(stack: TextStack, prompts: list[str]) -> None:
    """Check our invariants: the template's length, one count per kind of prompt, right padding."""
    prefix = DEFAULT_PROMPT_TEMPLATE["template"].split("{}")[0]
    assert len(stack.tokenizer(prefix).input_ids) == TEMPLATE_TOKENS
    assert stack.tokenizer.padding_side == "right"
    for kind in (prompts[0::2], prompts[1::2]):
        texts = [DEFAULT_PROMPT_TEMPLATE["template"].format(prompt) for prompt in kind]
        rows = stack.tokenizer(texts).input_ids
        assert len({len(row) for row in rows}) == 1
        assert len({tuple(row[:TEMPLATE_TOKENS]) for row in rows}) == 1
        assert len({len(row) for row in stack.tokenizer_2(kind).input_ids}) == 1
