"""Names of attention: copies of an enabled model, and handles disabled in any order."""

import copy
import pickle

import pytest
import torch
from language_models import SMALL, decisions, prompt, tiny_model

from xattn_video import UnsupportedModelError, enable_xattention, register_attention


@pytest.fixture
def llama():
    return tiny_model("llama")


def logits(model, given):
    with torch.no_grad():
        return model(**given).logits


def name_of(model) -> str:
    return model.config.get_text_config()._attn_implementation


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))]
)
def test_a_copy_of_an_enabled_model_refuses_once_the_name_is_removed(llama, copied):
    given = prompt()
    expected = logits(llama, given)
    with enable_xattention(llama, 0.5, **SMALL) as handle:
        twin = copied(llama)
    # Another model neither takes the name nor gives the copy its settings.
    with enable_xattention(tiny_model("qwen2"), 1.0, **SMALL) as other:
        assert other.name != handle.name
        with pytest.raises(
            RuntimeError, match=rf"^{handle.name} was disabled, but this model, a copy of .*; call"
        ):
            logits(twin, given)
    with enable_xattention(twin, 0.5, **SMALL) as own:
        logits(twin, given)
    assert decisions(own.report()) == {"sparse": 1}
    assert name_of(twin) == "sdpa"
    assert torch.equal(logits(twin, given), expected)


@pytest.mark.parametrize("name", ["llama", "qwen2-vl"])
def test_a_copy_of_an_enabled_model_can_be_enabled_beside_it(name):
    model = tiny_model(name)
    with enable_xattention(model, 0.5, **SMALL) as first:
        twin = copy.deepcopy(model)
        with enable_xattention(twin, 0.7, **SMALL) as second:
            assert (name_of(model), name_of(twin)) == (first.name, second.name)
            assert first.name != second.name
            with pytest.raises(RuntimeError, match="already enabled on this model"):
                enable_xattention(twin)
        # Not the name of the model that it was copied from.
        assert name_of(twin) == "sdpa"
    assert name_of(model) == "sdpa"


def test_a_removed_attention_refuses_under_masks_of_the_user(llama):
    with enable_xattention(llama, 0.5, **SMALL):
        twin = copy.deepcopy(llama)
    own = torch.ones(1, 1, 30, 30, dtype=torch.bool).tril()
    with pytest.raises(RuntimeError, match="was disabled"):
        logits(twin, {**prompt(30), "attention_mask": own})


def test_handles_can_be_disabled_in_any_order(llama):
    registered = register_attention(0.9, **SMALL)
    llama.set_attn_implementation("xattention")
    enabled = enable_xattention(llama, 0.5, **SMALL)
    registered.disable()
    enabled.disable()
    assert name_of(llama) == "sdpa"


def test_a_registered_name_is_restored(llama):
    with register_attention(0.9, **SMALL):
        llama.set_attn_implementation("xattention")
        enable_xattention(llama, 0.5, **SMALL).disable()
        assert name_of(llama) == "xattention"
        llama.set_attn_implementation("sdpa")


def test_a_registered_name_may_resemble_a_generated_one(llama):
    with register_attention(0.9, name="xattention-big", **SMALL):
        llama.set_attn_implementation("xattention-big")
        with enable_xattention(llama, 0.5, **SMALL) as handle:
            assert name_of(llama) == handle.name
        assert name_of(llama) == "xattention-big"
        llama.set_attn_implementation("sdpa")


def test_a_generated_name_cannot_be_registered():
    with pytest.raises(ValueError, match="gives models names such as 'xattention-1'; use another"):
        register_attention(name="xattention-1")


@pytest.mark.parametrize("name", [5, None])
def test_a_name_that_is_no_string_is_refused(name):
    with pytest.raises(TypeError, match=f"^name must be a string, got {name}; use"):
        register_attention(0.5, name=name)


@pytest.mark.parametrize("thing", ["demo", None, {"model": "demo"}])
def test_what_is_no_model_is_told_what_is_expected(thing):
    with pytest.raises(UnsupportedModelError, match="for language, give enable_xattention a mod"):
        enable_xattention(thing)
