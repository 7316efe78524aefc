"""Attention that is more than a softmax of scaled products is refused, in prefill and decoding."""

import pytest
import torch
from command_line import run_cli
from language_models import SMALL, prompt, tiny_model

import xattn_video
from xattn_video import UnsupportedModelError, enable_xattention
from xattn_video.cli import prefill_job


@pytest.fixture(scope="module")
def llama():
    return tiny_model("llama")


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("gemma2", "soft-capped scores, as in Gemma 2"),
        ("gpt-oss", "attention sinks, as in gpt-oss"),
        ("deepseek-v3", "values of another size"),
        ("glm-5", "the model's own selection of tokens"),
        ("minimax-m3", "the model's own selection of blocks"),
    ],
)
@pytest.mark.parametrize("length", [1, 20, 300])
def test_attention_of_another_kind_is_refused_in_prefill_and_decode(name, what, length):
    model = tiny_model(name)
    with xattn_video.register_attention(0.9, name="xattention-any", **SMALL) as handle:
        model.set_attn_implementation("xattention-any")
        with (
            pytest.raises(
                ValueError, match=f"^xattention-any does not compute {what}.*; use attn_"
            ),
            torch.no_grad(),
        ):
            model(**prompt(length))
    assert handle.report().summary().endswith(", 1 refused")


@pytest.mark.parametrize("length", [1, 20, 300])
def test_a_model_that_takes_only_its_mask_from_the_interface_is_refused(length):
    """GIT's text would add the mask to its scores."""
    model = tiny_model("git")
    with xattn_video.register_attention(0.9, name="xattention-any", **SMALL) as handle:
        model.set_attn_implementation("xattention-any")
        with (
            pytest.raises(UnsupportedModelError, match="GitForCausalLM does not use transf"),
            torch.no_grad(),
        ):
            model(**prompt(length))
    assert handle.report().summary().endswith(", 1 refused")


def test_dropout_is_refused():
    model = tiny_model("gpt2").train()
    with (
        enable_xattention(model, 0.9, **SMALL),
        pytest.raises(ValueError, match=r"does not compute dropout; call model\.eval\(\) first"),
        torch.no_grad(),
    ):
        model(**prompt())


@pytest.mark.parametrize(
    ("argument", "what"),
    [
        ("position_bias", "a bias for positions"),
        ("sinks", "attention sinks"),
        ("indices", "the model's own selection of tokens"),
        ("block_indices", "the model's own selection of blocks"),
    ],
)
def test_an_argument_that_changes_the_weights_is_refused(llama, argument, what):
    with enable_xattention(llama, 0.9, **SMALL) as handle:
        tensors = torch.randn(3, 1, 4, 20, 16)
        with pytest.raises(ValueError, match=f"does not compute {what}"):
            handle._attention.attend(
                llama.model.layers[0].self_attn, *tensors, None, **{argument: torch.zeros(1)}
            )


def test_a_prompt_far_too_long_is_refused_before_it_is_made(tiny_llm, monkeypatch):
    monkeypatch.setattr(prefill_job, "needle_prompt", lambda *_: pytest.fail("was made"))
    code, _, err = run_cli("prefill", f"--model={tiny_llm}", "--tokens=999999999", "--device=cpu")
    assert code == 2
    assert "the model's context is 2,048 tokens, got 999,999,999" in err
