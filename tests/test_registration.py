"""`enable_xattention` on language models, `register_attention`, and what both refuse."""

import re
import sys

import pytest
import torch
from language_models import SMALL, decisions, generate, prompt, tiny_model
from test_imports import run_without
from transformers import AttentionInterface, AttentionMaskInterface, LlamaConfig, LlamaForCausalLM

from xattn_video import (
    ThresholdSchedule,
    UnsupportedModelError,
    enable_xattention,
    register_attention,
)
from xattn_video.errors import MissingPackageError
from xattn_video.language.prefill_attention import PrefillAttention
from xattn_video.policy.settings import SparseSettings


@pytest.fixture(scope="module")
def llama():
    return tiny_model("llama")


def names() -> set[str]:
    """The names that run; those that were generated and removed stay in transformers' tables."""
    attention, masks = (
        {name for name, of in table.items() if isinstance(owner(of), PrefillAttention)}
        for table in (AttentionInterface(), AttentionMaskInterface())
    )
    assert attention == masks
    return attention


def owner(function):
    return getattr(function, "__self__", None)


def test_it_gives_the_model_a_name_and_takes_it_back(llama):
    llama.set_attn_implementation("eager")
    with enable_xattention(llama, 0.9) as handle:
        assert llama.config._attn_implementation == handle.name
        assert names() == {handle.name}
        assert re.fullmatch(r"xattention-\d+", handle.name)
    assert llama.config._attn_implementation == "eager"
    assert names() == set()


def test_two_models_have_two_thresholds(llama):
    other = tiny_model("llama")
    given = prompt()
    with (
        enable_xattention(llama, 0.3, **SMALL) as low,
        enable_xattention(other, 0.95, **SMALL) as high,
    ):
        generate(llama, given)
        generate(other, given)
    assert low.report().density < high.report().density - 0.1


def test_what_is_wrapped_is_found(llama):
    with enable_xattention(torch.compile(llama, backend="eager"), 0.9) as handle:
        assert llama.config._attn_implementation == handle.name


def test_enabling_twice_raises(llama):
    with (
        enable_xattention(llama),
        pytest.raises(RuntimeError, match="already enabled on this model; call disable"),
    ):
        enable_xattention(llama)
    assert names() == set()


def test_disabling_leaves_a_later_choice_alone(llama):
    handle = enable_xattention(llama)
    llama.set_attn_implementation("sdpa")
    handle.disable()
    handle.disable()
    assert llama.config._attn_implementation == "sdpa"


def test_the_report_outlives_it(llama):
    with enable_xattention(llama, 0.9, **SMALL) as handle:
        assert handle.report().summary() == "nothing has run, 0 refused"
        generate(llama, prompt())
    generate(llama, prompt())
    report = handle.report()
    assert decisions(report) == {"sparse": 1, "decode": 2}
    assert report.sparse_tokens == 300
    assert report.backends == ("torch_gather",)
    assert report.summary().startswith("2/2 layers sparse over 300 tokens, density 0.")


def test_the_report_can_be_saved(llama, tmp_path):
    import json

    with enable_xattention(llama, 0.9, **SMALL) as handle, torch.no_grad():
        llama(**prompt())
    handle.report().save(tmp_path / "report.json")
    saved = json.loads((tmp_path / "report.json").read_text())
    assert [one["sparse"] for one in saved["layers"]] == [1, 1]
    assert saved["density"] == handle.report().density


def test_a_registered_name_serves_from_pretrained(llama, tmp_path):
    llama.save_pretrained(tmp_path)
    with register_attention(0.9, **SMALL) as handle:
        model = LlamaForCausalLM.from_pretrained(tmp_path, attn_implementation="xattention")
        generate(model, prompt())
    assert handle.report().sparse_layers == (0, 1)
    assert names() == set()


def test_a_name_can_be_registered_anew(llama):
    first = register_attention(0.3, **SMALL)
    with register_attention(0.9, **SMALL) as second:
        first.disable()
        llama.set_attn_implementation("xattention")
        generate(llama, prompt())
        llama.set_attn_implementation("sdpa")
    assert first.report().summary() == "nothing has run, 0 refused"
    assert second.report().sparse_layers == (0, 1)


def test_a_name_must_be_registered_before_a_model_is_loaded(llama, tmp_path):
    """The configuration does not save the name; transformers itself refuses an unknown one."""
    llama.save_pretrained(tmp_path)
    assert "xattention" not in (tmp_path / "config.json").read_text()
    with pytest.raises(ValueError, match="xattention"):
        LlamaForCausalLM.from_pretrained(tmp_path, attn_implementation="xattention")


def test_continuous_batching_is_refused_by_transformers(llama):
    with enable_xattention(llama, 0.9), pytest.raises(ValueError, match="xattention"):
        llama.generate_batch([[1, 2, 3]], progress_bar=False)


@pytest.mark.parametrize("name", ["my-flash", "sdpa2", "org/kernel", ""])
def test_a_name_that_transformers_reads_otherwise_is_refused(name):
    with pytest.raises(ValueError, match=r'in a name, got .*; use another name, such as "x'):
        register_attention(name=name)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"warmup_steps": 2}, "warmup_steps is not a setting for language models; use threshold"),
        ({"threshold": [0.9, 0.8]}, "a language model has no denoising steps"),
        ({"threshold": lambda step: 0.9}, "a language model has no denoising steps"),
        ({"threshold": {3: 0.9}}, "one point, at step 0, for each layer or head"),
        (
            {"threshold": SparseSettings(0.9, refresh_every=3)},
            "refresh_every=3 has no effect on a",
        ),
        ({"threshold": SparseSettings(0.9, cooldown_steps=3)}, "cooldown_steps=3 has no effect"),
        (
            {"threshold": SparseSettings(0.9, token_order="hilbert")},
            "token_order='hilbert' has no effect",
        ),
        ({"threshold": 95}, r"threshold must lie in \(0, 1\], got 95"),
        ({"dense_layers": -1}, "dense_layers must be at least 0, got -1"),
        ({"dense_layers": 1.5}, "dense_layers must be a whole number, got 1.5"),
        ({"dense_layers": 2}, "dense_layers must be below the model's 2 layers, got 2"),
        (
            {"threshold": ThresholdSchedule(((0, 0.9),), layers={2: ((0, 0.8),)})},
            "names layer 2, but the model has 2 layers",
        ),
        (
            {"threshold": ThresholdSchedule(((0, 0.9),), heads={(1, 4): ((0, 0.8),)})},
            "names head 4 of layer 1, but a layer has 4 heads",
        ),
        ({"stride": 12}, "stride must divide block_size"),
        ({"backend": "flush"}, "unknown attention backend 'flush'"),
    ],
)
def test_settings_that_say_nothing_are_refused_and_the_model_is_left_alone(llama, options, text):
    llama.set_attn_implementation("sdpa")
    with pytest.raises((ValueError, TypeError), match=text):
        enable_xattention(llama, **options)
    assert llama.config._attn_implementation == "sdpa"
    assert names() == set()


def test_a_registered_name_checks_the_layers_of_its_model(llama):
    with register_attention(0.9, dense_layers=2, **SMALL):
        llama.set_attn_implementation("xattention")
        with pytest.raises(ValueError, match="below the model's 2 layers"), torch.no_grad():
            llama(**prompt())
        llama.set_attn_implementation("sdpa")


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"dense_layers": 2}, "must be below the model's 2 layers"),
        (
            {"threshold": ThresholdSchedule(((0, 0.9),), layers={2: ((0, 0.8),)})},
            "names layer 2, but the model has 2 layers",
        ),
    ],
)
def test_a_registered_name_checks_each_of_its_models(options, text):
    """A model of three layers, then one of two, whose layers have the same numbers."""
    model = tiny_model("llama")
    config = LlamaConfig(**model.config.to_dict() | {"num_hidden_layers": 3})
    deeper = LlamaForCausalLM(config).eval()
    with register_attention(**SMALL, **options), torch.no_grad():
        for one in (deeper, model):
            one.set_attn_implementation("xattention")
        deeper(**prompt())
        with pytest.raises(ValueError, match=text):
            model(**prompt())


def test_the_default_threshold_of_language_is_lower():
    from xattn_video.language.prefill_settings import PrefillSettings

    assert PrefillSettings.of(None).sparse.threshold == 0.9
    assert PrefillSettings.of(None, density=0.1).sparse.threshold is None
    assert PrefillSettings.of(None).min_tokens_on("cpu") == 8192
    assert PrefillSettings.of(None, min_tokens=5).min_tokens_on("cpu") == 5


def test_a_model_with_an_encoder_is_refused():
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(vocab_size=32, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    with pytest.raises(
        UnsupportedModelError, match="has an encoder and a decoder; use a decoder-only"
    ):
        enable_xattention(T5ForConditionalGeneration(config))


def test_a_model_without_attention_is_refused():
    from transformers import MambaConfig, MambaForCausalLM

    config = MambaConfig(vocab_size=32, hidden_size=8, num_hidden_layers=1, state_size=4)
    with pytest.raises(
        UnsupportedModelError, match="MambaForCausalLM has no attention heads; use"
    ):
        enable_xattention(MambaForCausalLM(config))


def test_a_model_with_attention_of_its_own_is_refused():
    from transformers import BloomConfig, BloomForCausalLM

    model = BloomForCausalLM(BloomConfig(vocab_size=32, hidden_size=8, n_layer=1, n_head=2))
    with pytest.raises(UnsupportedModelError, match="its attention cannot be replaced"):
        enable_xattention(model)
    assert names() == set()


@pytest.mark.parametrize("name", ["git", "gemma2", "gpt-oss"])
def test_a_model_that_sdpa_does_not_run_is_refused(name):
    """GIT's vision tower uses the interface, and its text only the mask."""
    model = tiny_model(name)
    with pytest.raises(UnsupportedModelError, match="cannot run with transformers' SDPA"):
        enable_xattention(model)
    assert names() == set()


def test_only_the_text_gets_the_name_and_all_get_their_own_back():
    """The configuration of this model's text is the model's own."""
    model = tiny_model("phi4-multimodal")
    model.set_attn_implementation({"vision_config": "eager"})

    def given():
        config = model.config
        return [
            one._attn_implementation for one in (config, config.vision_config, config.audio_config)
        ]

    before = given()
    with enable_xattention(model) as handle:
        assert given() == [handle.name, *before[1:]]
    assert given() == before == ["sdpa", "eager", "sdpa"]


def test_a_warm_up_of_denoising_steps_is_refused(llama):
    with pytest.raises(ValueError, match="warmup_steps=3 has no effect on a language model"):
        enable_xattention(llama, SparseSettings(0.5, warmup_steps=3))
    for steps in (SparseSettings(0.5).warmup_steps, 0):
        enable_xattention(llama, SparseSettings(0.5, warmup_steps=steps)).disable()


def test_the_model_of_a_pipeline_is_enabled(llama):
    from transformers import TextGenerationPipeline

    pipeline = TextGenerationPipeline.__new__(TextGenerationPipeline)
    pipeline.model = llama
    with enable_xattention(pipeline) as handle:
        assert llama.config._attn_implementation == handle.name


def test_a_disabled_handle_does_not_begin_again(llama):
    handle = enable_xattention(llama)
    handle.disable()
    again = "was disabled; enable or register attention again"
    with pytest.raises(RuntimeError, match=again), handle:
        pass


def test_a_video_transformer_does_not_load_the_language_side(monkeypatch):
    from hunyuan import tiny_transformer

    # Importing it would raise.
    monkeypatch.setitem(sys.modules, "xattn_video.language.registration", None)
    with enable_xattention(tiny_transformer(), 0.9) as handle:
        assert handle.report().summary().endswith("nothing has run, 0 refused")


def test_a_language_model_does_not_load_the_video_side(llama, monkeypatch):
    monkeypatch.setitem(sys.modules, "xattn_video.processors.enable", None)
    with enable_xattention(llama, 0.9) as handle:
        assert handle.report().summary() == "nothing has run, 0 refused"


def test_without_transformers_it_is_one_line():
    run = run_without({"transformers"}, "import xattn_video; xattn_video.register_attention()")
    assert run.returncode == 1
    assert run.stderr.splitlines()[-1].endswith(
        "sparse prefill needs transformers, which is not installed; pip install transformers."
    )


def test_an_older_transformers_is_refused(monkeypatch):
    monkeypatch.setattr("xattn_video.language.registration._version", "5.9.1")
    with pytest.raises(MissingPackageError, match=r"transformers 5\.14 or newer, got 5\.9\.1"):
        register_attention()
