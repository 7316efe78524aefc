"""The memory that a prefill is planned to need, and what would fit where it does not."""

import pytest
import torch
import transformers
from command_line import run_cli
from language_models import CACHE, tiny_model

from xattn_video import UnsupportedModelError
from xattn_video.language.kv_memory import describe_prefill_shortage, plan_prefill
from xattn_video.language.model_sources import find_language_model

_COMMON = {
    "vocab_size": 128,
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 2048,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_HEADS = {"intermediate_size": 64, "num_key_value_heads": 2, "head_dim": 16}
_EXPERTS = {"num_experts_per_tok": 1, "moe_intermediate_size": 32}
_LINEAR = {
    "linear_num_value_heads": 2,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}
_GEMMA = {
    **_HEADS,
    "sliding_window": 100,
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": 128,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
}
# Layers of several kinds, and heads that share keys.
_CACHES = {
    "qwen3-next": (
        "Qwen3NextConfig",
        {
            **_HEADS,
            **_EXPERTS,
            **_LINEAR,
            "num_experts": 2,
            "shared_expert_intermediate_size": 32,
        },
    ),
    "qwen3.5": ("Qwen3_5TextConfig", {**_HEADS, **_LINEAR}),
    "llama4": (
        "Llama4TextConfig",
        {
            **_HEADS,
            "attention_chunk_size": 100,
            "no_rope_layers": [1, 1, 1, 0],
            "intermediate_size_mlp": 64,
            "num_local_experts": 2,
            "num_experts_per_tok": 1,
        },
    ),
    "lfm2": (
        "Lfm2Config",
        {
            "num_key_value_heads": 2,
            "intermediate_size": 64,
            "layer_types": ["conv", "full_attention"] * 2,
        },
    ),
    "gpt-bigcode": ("GPTBigCodeConfig", {"num_key_value_heads": 2}),
    "falcon": ("FalconConfig", {}),
    "falcon-new": ("FalconConfig", {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "gemma3n": ("Gemma3nTextConfig", {**_GEMMA, "num_kv_shared_layers": 2, "laurel_rank": 8}),
    "gemma4": ("Gemma4TextConfig", {**_GEMMA, "global_head_dim": 32}),
    "gemma4-shared": (
        "Gemma4TextConfig",
        {
            **_GEMMA,
            "global_head_dim": 32,
            "attention_k_eq_v": True,
            "num_global_key_value_heads": 1,
            "num_kv_shared_layers": 2,
        },
    ),
}


@pytest.mark.parametrize(
    ("shape", "parameters", "kib"),
    [("llama-3-8b", 8030, 128), ("qwen2.5-7b", 7615, 56), ("smollm2-135m", 134.5, 22.5)],
)
def test_the_plan_of_known_shapes(shape, parameters, kib):
    """Parameters and keys and values of a token, as the models' own pages have them."""
    options = [f"--model=random:{shape}", "--tokens=1048576", "--dtype=bfloat16", "--plan"]
    code, out, err = run_cli("prefill", *options, "--device=cpu")
    assert code == 0, err
    assert f"{shape}, {parameters:,.1f}"[:-2] in out
    assert f"at {kib:g} KiB per token" in out


def test_windows_keep_no_more_than_their_keys(tmp_path):
    tiny_model("gemma3").config.save_pretrained(tmp_path)
    source = find_language_model(str(tmp_path), 0)
    plan = plan_prefill(source, 992, 8, 256, torch.float32, 128)
    # 2 x 2 heads x 16 x 4 bytes; one layer keeps 100 of 1,000 tokens.
    assert plan.kv_cache * 2**30 == 256 * (1000 + 100)
    assert plan.kv_kib_per_token == 0.25


@pytest.mark.parametrize("name", [*_CACHES])
def test_the_plan_is_the_size_of_the_static_cache(name, tmp_path):
    plan, model = _planned(name, tmp_path)
    cache = transformers.StaticCache(config=model.config, max_cache_len=1000)
    with torch.inference_mode():
        model(torch.randint(3, 100, (1, 9)), **{CACHE: cache})
    held = [getattr(layer, kind, None) for layer in cache.layers for kind in ("keys", "values")]
    assert plan.kv_cache * 2**30 == sum(one.nbytes for one in held if one is not None)
    full = [layer for layer in cache.layers if getattr(layer, "max_cache_len", 0) == 1000]
    of_token = sum(layer.keys.nbytes + layer.values.nbytes for layer in full) / 1000
    assert plan.kv_kib_per_token == of_token / 1024


def test_the_widest_layer_sets_the_work_of_a_chunk(tmp_path):
    """Attention's, with heads of 256 in one layer and 16 in the others."""
    wide = _planned("gemma4", tmp_path, global_head_dim=256)[0].work
    narrow = _planned("gemma4", tmp_path, global_head_dim=32)[0].work
    # 6 tensors of 256 tokens, 4 heads and 4 bytes.
    assert (wide - narrow) * 2**30 == 6 * 256 * 4 * 4 * (256 - 32)
    listed, one = (
        _planned("gemma3n", tmp_path, intermediate_size=size)[0].work
        for size in ([64, 4096, 64, 64], 4096)
    )
    assert listed == one


def test_layers_without_a_static_cache_are_refused(tmp_path):
    with pytest.raises(UnsupportedModelError, match="no static cache for layers of kind 'heavily"):
        _planned("deepseek-v4", tmp_path)


def _planned(name, folder, **changes):
    """The plan of 1,000 tokens, and the model."""
    kind, values = {**_CACHES, "deepseek-v4": ("DeepseekV4Config", {})}[name]
    torch.manual_seed(0)
    config = getattr(transformers, kind)(**{**_COMMON, **values, **changes})
    if kind == "Gemma4TextConfig" and config.per_layer_config is None:
        pytest.skip("transformers 5.14 does not tell the sizes of Gemma 4's layers")
    config.save_pretrained(folder)
    source = find_language_model(str(folder), 0)
    plan = plan_prefill(source, 992, 8, 256, torch.float32, 128)
    return plan, transformers.AutoModelForCausalLM.from_config(config).eval()


def test_a_shortage_says_what_would_fit():
    source = find_language_model("random:smollm2-135m", 2**20)
    plan = plan_prefill(source, 2**20, 8, 32768, torch.bfloat16, 128)
    assert describe_prefill_shortage(plan, None) is None
    assert describe_prefill_shortage(plan, plan.peak) is None
    smaller = describe_prefill_shortage(plan, plan.peak - plan.work / 3)
    assert smaller.startswith("1,048,576 tokens need about ")
    assert smaller.endswith("; --chunk-size 16384 would fit.")
    fewer = describe_prefill_shortage(plan, plan.weights + plan.work + plan.kv_cache / 2)
    assert fewer.endswith("; --tokens 524288 would fit.")
    none = describe_prefill_shortage(plan, plan.weights)
    assert none.endswith("; use a smaller model or a device with more.")
