"""The memory that a prefill is planned to need, and what would fit where it does not."""

import pytest
import torch
from command_line import run_cli
from language_models import tiny_model

from xattn_video.language.kv_memory import describe_prefill_shortage, plan_prefill
from xattn_video.language.model_sources import find_language_model


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
