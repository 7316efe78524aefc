"""Tiny language models with random weights, each made from its configuration."""

import inspect
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

from xattn_video import enable_xattention

# The argument's name until transformers 5.23 and from 5.24 on.
CACHE = {True: "cache", False: "past_key_values"}[
    "cache" in inspect.signature(transformers.LlamaForCausalLM.forward).parameters
]
VIDEO_TOKEN = 101
# 16 tokens in a block, so that a few hundred tokens are many blocks.
SMALL = {"block_size": 16, "stride": 8, "min_tokens": 64}
# Nearly every block is kept: the operator runs, and its result is that of dense attention.
NEARLY_ALL = 1 - 1e-7
# The logits of these models are of size 10 or so.
TOLERANCE = 2e-5
# Ways to generate, as arguments of `generate`.
HOWS = {
    "plain": {},
    "chunks": {"prefill_chunk_size": 96},
    "ragged chunks": {"prefill_chunk_size": 70},
    "static": {"cache_implementation": "static"},
    "static chunks": {"cache_implementation": "static", "prefill_chunk_size": 96},
    "no cache": {"use_cache": False},
    "beams": {"num_beams": 2},
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
    "8-bit cache": {"cache_implementation": "quantized", "cache_config": {"backend": "fp8"}},
}

_COMMON = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 2048,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_TINY_EXPERTS = {"num_local_experts": 2, "num_experts_per_tok": 1}
_LATENT = {
    "num_key_value_heads": 4,
    "moe_intermediate_size": 32,
    "n_routed_experts": 4,
    "num_experts_per_tok": 1,
    "n_group": 1,
    "topk_group": 1,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "first_k_dense_replace": 2,
}
_TINY_VISION = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
# Attention in every third layer.
_HYBRID = {
    "num_hidden_layers": 6,
    "num_key_value_heads": 4,
    "layers_block_type": ["mamba", "mamba", "hybrid"] * 2,
    "mamba_d_state": 8,
}
# name: the configuration's class, and what differs from the common one.
_CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "qwen2": ("Qwen2Config", {}),
    "qwen2-windows": (
        "Qwen2Config",
        {"use_sliding_window": True, "sliding_window": 100, "max_window_layers": 1},
    ),
    "mistral": ("MistralConfig", {"sliding_window": 100}),
    "gemma3": (
        "Gemma3TextConfig",
        {"sliding_window": 100, "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "llama4": (
        "Llama4TextConfig",
        {
            "attention_chunk_size": 100,
            "no_rope_layers": [1, 0],
            "intermediate_size_mlp": 64,
            **_TINY_EXPERTS,
        },
    ),
    "gpt2": (
        "GPT2Config",
        {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 2048},
    ),
    "gemma2": ("Gemma2Config", {"sliding_window": 100}),
    "gpt-oss": ("GptOssConfig", {"sliding_window": 100, **_TINY_EXPERTS}),
    "git": ("GitConfig", {"vision_config": _TINY_VISION}),
    "phi4-multimodal": (
        "Phi4MultimodalConfig",
        {
            "vision_config": {**_TINY_VISION, "crop_size": 28},
            "audio_config": {
                "hidden_size": 32,
                "intermediate_size": 32,
                "num_blocks": 1,
                "num_attention_heads": 2,
                "input_size": 8,
                "ext_pw_out_channel": 32,
                "nemo_conv_channels": 32,
                "time_reduction": 4,
            },
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e4,
                "partial_rotary_factor": 1.0,
            },
        },
    ),
    "zamba": (
        "ZambaConfig",
        {**_HYBRID, "attention_hidden_size": 128, "n_mamba_heads": 2},
    ),
    "zamba2": (
        "Zamba2Config",
        {
            **_HYBRID,
            "mamba_headdim": 32,
            "mamba_ngroups": 1,
            "num_mem_blocks": 1,
            "use_mem_rope": True,
            "n_mamba_heads": 4,
        },
    ),
    "deepseek-v3": ("DeepseekV3Config", _LATENT),
    # Keys and values of one size, so that the selection alone is refused.
    "glm-5": (
        "GlmMoeDsaConfig",
        {**_LATENT, "v_head_dim": 32, "index_topk": 64, "index_head_dim": 32, "index_n_heads": 2},
    ),
    "minimax-m3": (
        "MiniMaxM3VLTextConfig",
        {
            **_TINY_EXPERTS,
            "index_n_heads": 2,
            "index_head_dim": 16,
            "index_block_size": 16,
            "index_topk_blocks": 4,
            "layer_types": ["full_attention", "minimax_m3_sparse"],
        },
    ),
}


def tiny_model(name: str) -> PreTrainedModel:
    """A causal language model of two layers, in evaluation mode."""
    if name == "qwen2-vl":
        return _qwen2_vl()
    kind, changes = _CONFIGS[name]
    values = {} if name == "gpt2" else _COMMON
    if name == "gpt2":
        values = {key: _COMMON[key] for key in ("vocab_size", "pad_token_id", "initializer_range")}
    if name in ("deepseek-v3", "glm-5", "git", "phi4-multimodal", "zamba", "zamba2"):
        values = {key: value for key, value in _COMMON.items() if key != "head_dim"}
    config = getattr(transformers, kind)(**{**values, **changes})
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def _qwen2_vl() -> PreTrainedModel:
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]}
    vision = {
        "depth": 1,
        "embed_dim": 32,
        "hidden_size": 64,
        "num_heads": 2,
        "mlp_ratio": 2,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "in_channels": 3,
    }
    text = {key: value for key, value in _COMMON.items() if key != "head_dim"}
    config = transformers.Qwen2VLConfig(
        text_config={**text, "rope_parameters": rope},
        vision_config=vision,
        image_token_id=100,
        video_token_id=VIDEO_TOKEN,
        vision_start_token_id=102,
        vision_end_token_id=103,
    )
    torch.manual_seed(0)
    return transformers.Qwen2VLForConditionalGeneration(config).eval()


def video_prompt() -> dict[str, torch.Tensor]:
    """A prompt for Qwen2-VL with a clip of 64 tokens among 257."""
    frames, rows, columns = 4, 8, 8
    clip = [102, *[VIDEO_TOKEN] * (frames * rows * columns // 4), 103]
    ids = torch.tensor([[1, *range(3, 90), *clip, *range(3, 99)]])
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values_videos": torch.randn(frames * rows * columns, 3 * 2 * 14 * 14),
        "video_grid_thw": torch.tensor([[frames, rows, columns]]),
        "mm_token_type_ids": torch.where(ids == VIDEO_TOKEN, 2, 0),
    }


def prompt(length: int = 300, batch: int = 1, left_padding: tuple[int, ...] = ()) -> dict:
    """Random tokens, and their mask where some are padding on the left."""
    ids = torch.randint(3, 100, (batch, length))
    if not left_padding:
        return {"input_ids": ids}
    mask = torch.ones_like(ids)
    for item, padding in enumerate(left_padding):
        ids[item, :padding], mask[item, :padding] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


def generate(model: PreTrainedModel, given: dict, **options: Any) -> tuple:
    """New tokens `[B, 3]`, and their logits, one tensor for each."""
    length = given["input_ids"].shape[1]
    out = model.generate(
        **given,
        max_new_tokens=3,
        do_sample=False,
        pad_token_id=0,
        # No token ends it.
        eos_token_id=10**6,
        output_logits=True,
        return_dict_in_generate=True,
        **options,
    )
    return out.sequences[:, length:], out.logits


def assert_as_sdpa(model: PreTrainedModel, given: dict, tau: float = NEARLY_ALL, **options: Any):
    """The report of a generation that gave the tokens and logits that SDPA gives."""
    model.set_attn_implementation("sdpa")
    tokens, logits = generate(model, given, **options)
    with enable_xattention(model, tau, **SMALL) as handle:
        found, found_logits = generate(model, given, **options)
    assert torch.equal(found, tokens)
    for one, of_sdpa in zip(found_logits, logits, strict=True):
        torch.testing.assert_close(one, of_sdpa, atol=TOLERANCE, rtol=0)
    return handle.report()


def decisions(report) -> dict[str, int]:
    """{decision: number of forward passes}."""
    return {one.decision: one.forwards for one in report.forwards}


def save_with_tokenizer(folder) -> None:
    """Write a tiny Llama with a tokenizer of bytes and a context of 2,048 tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: number for number, letter in enumerate([*alphabet, "<s>", "</s>"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    wrapped = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>"
    )
    wrapped.save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**{**_COMMON, "vocab_size": len(vocabulary)})
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
