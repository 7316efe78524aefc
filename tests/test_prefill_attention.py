"""Sparse prefill in transformers' models: the result of SDPA where all blocks are kept."""

import warnings

import pytest
import torch
from language_models import (
    CACHE,
    HOWS,
    NEARLY_ALL,
    SMALL,
    TOLERANCE,
    assert_as_sdpa,
    decisions,
    generate,
    prompt,
    tiny_model,
    video_prompt,
)
from transformers import LlamaForCausalLM

import xattn_video
from xattn_video import ThresholdSchedule, enable_xattention


@pytest.fixture(scope="module")
def llama():
    return tiny_model("llama")


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("tau", [1.0, NEARLY_ALL])
def test_generation_is_that_of_sdpa(llama, tau, how):
    report = assert_as_sdpa(llama, prompt(), tau, **HOWS[how])
    assert report.sparse_layers == (() if tau == 1 else (0, 1))
    assert tau == 1 or report.density > 0.99


@pytest.mark.parametrize("name", ["qwen2", "gpt2"])
@pytest.mark.parametrize("how", ["plain", "chunks", "static"])
def test_other_models_too(name, how):
    assert assert_as_sdpa(tiny_model(name), prompt(), **HOWS[how]).sparse_layers == (0, 1)


@pytest.mark.parametrize("how", ["plain", "chunks", "static"])
@pytest.mark.parametrize(
    ("name", "sparse"),
    [("mistral", ()), ("qwen2-windows", (0,)), ("gemma3", (1,)), ("llama4", (1,))],
)
def test_layers_with_windows_stay_dense_and_are_counted(name, sparse, how):
    report = assert_as_sdpa(tiny_model(name), prompt(), **HOWS[how])
    assert report.sparse_layers == sparse
    for layer in {0, 1} - {*sparse}:
        # A chunk within the window needs no mask of its own.
        assert set(report.layers[layer].dense) == {"window", "decode"}


def test_reasons_without_a_mask_are_those_of_the_present_forward_pass():
    """A chunk within the window needs no mask, and neither does decoding before it."""
    model = tiny_model("llama4")
    with enable_xattention(model, 0.5, **SMALL) as handle:
        generate(model, prompt(90))
        before = dict(handle.report().layers[0].dense)
        generate(model, prompt(90))
    assert before == {"window": 1, "decode": 2}
    assert handle.report().layers[0].dense == {"window": 2, "decode": 4}


@pytest.mark.parametrize("min_tokens", [0, 1000])
def test_a_layer_that_is_not_causal_sees_every_key(min_tokens):
    """As models that are made embedders set it; SDPA's function asks the layer too."""
    model, given = tiny_model("llama"), prompt(300)
    for layer in model.model.layers:
        layer.self_attn.is_causal = False
    with torch.no_grad():
        model.set_attn_implementation("sdpa")
        expected = model(**given).logits
        with enable_xattention(model, 0.5, **SMALL | {"min_tokens": min_tokens}) as handle:
            found = model(**given).logits
    assert handle.report().summary().startswith("0/2 layers sparse over 0 tokens, ")
    assert "not causal 2" in handle.report().summary()
    assert torch.equal(found, expected)


@pytest.mark.parametrize("min_tokens", [0, 1000])
def test_a_later_chunk_of_a_layer_that_is_not_causal_is_causal(min_tokens):
    """As SDPA's mask of such a chunk is; PaliGemma's layers are not causal either."""
    model, ids = tiny_model("llama"), prompt(300)["input_ids"]
    for layer in model.model.layers:
        layer.self_attn.is_causal = False
    model.set_attn_implementation("sdpa")
    expected = hidden_states(model, ids, 100)
    with enable_xattention(model, 1.0, **SMALL | {"min_tokens": min_tokens}):
        found = hidden_states(model, ids, 100)
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize("name", ["zamba", "zamba2"])
def test_a_layer_without_a_number_runs_sparse_and_is_not_counted_off(name):
    """Zamba's shared layer has no number, and Zamba 2's has -1."""
    model, given = tiny_model(name), prompt(300)
    with torch.no_grad(), enable_xattention(model, 0.5, **SMALL) as handle:
        model(**given, use_cache=False)
    report = handle.report()
    assert report.summary().startswith("2 runs of layers without a number sparse over 300 tokens")
    assert not report.dense_reasons
    with (
        torch.no_grad(),
        enable_xattention(model, 0.5, dense_layers=1, **SMALL),
        pytest.raises(ValueError, match="counts layers, but this layer has no layer_idx; leave"),
    ):
        model(**given, use_cache=False)


def test_nothing_is_sparse_where_every_layer_has_a_window():
    from transformers import Gemma3ForCausalLM

    config = tiny_model("gemma3").config
    config.layer_types = ["sliding_attention"] * 2
    model = Gemma3ForCausalLM(config).eval()
    with torch.no_grad(), enable_xattention(model, 0.5, **SMALL) as handle:
        model(**prompt(300))
    assert handle.report().sparse_tokens == 0
    assert handle.report().dense_reasons == {"window": 2}


def test_a_mask_of_whole_numbers_is_no_bounds(llama):
    given = prompt(40)
    mask = torch.ones(1, 1, 40, 40, dtype=torch.int64)
    with (
        torch.no_grad(),
        enable_xattention(llama, 0.5, **SMALL),
        pytest.raises(RuntimeError, match="Expected attn_mask dtype to be bool or float"),
    ):
        llama(given["input_ids"], attention_mask=mask)


def hidden_states(model, ids, chunk, cache=None):
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config) if cache is None else cache
    with torch.no_grad():
        return torch.cat(
            [
                model.model(part, **{CACHE: cache}, use_cache=True).last_hidden_state
                for part in ids.split(chunk, dim=1)
            ],
            dim=1,
        )


@pytest.mark.parametrize("chunk", [96, 160])
def test_chunks_of_whole_blocks_change_nothing(llama, chunk):
    """To the bit, as long as the last chunk holds a block too: 300 is 3 x 96 + 12 otherwise."""
    ids = prompt(312)["input_ids"]
    with enable_xattention(llama, 0.7, **SMALL) as handle:
        whole = hidden_states(llama, ids, 312)
        assert torch.equal(hidden_states(llama, ids, chunk), whole)
    assert set(handle.report().dense_reasons) == set()


def test_a_last_chunk_below_a_block_runs_dense(llama):
    ids = prompt(300)["input_ids"]
    with enable_xattention(llama, 0.7, **SMALL) as handle:
        whole = hidden_states(llama, ids, 300)
        chunked = hidden_states(llama, ids, 96)
    assert torch.equal(chunked[:, :288], whole[:, :288])
    assert not torch.equal(chunked[:, 288:], whole[:, 288:])
    assert handle.report().dense_reasons == {"short chunk": 2}


def test_a_second_turn_on_a_kept_cache_is_that_of_sdpa(llama):
    from transformers import DynamicCache

    ids = prompt(300)["input_ids"]

    def two_turns():
        cache = DynamicCache(config=llama.config)
        first = llama.generate(
            ids[:, :150], **{CACHE: cache}, max_new_tokens=2, pad_token_id=0, do_sample=False
        )
        more = torch.cat([first, ids[:, 150:]], dim=1)
        return generate(llama, {"input_ids": more}, **{CACHE: cache})

    llama.set_attn_implementation("sdpa")
    expected, _ = two_turns()
    with enable_xattention(llama, NEARLY_ALL, **SMALL) as handle:
        found, _ = two_turns()
    assert torch.equal(found, expected)
    assert decisions(handle.report())["sparse"] == 2


def test_a_vision_tower_keeps_its_attention():
    model = tiny_model("qwen2-vl")
    for how in ("plain", "chunks", "static"):
        report = assert_as_sdpa(model, video_prompt(), **HOWS[how])
        assert report.sparse_layers == (0, 1)
        # None of them is without a number: the tower was never asked.
        assert len(report.layers) == 2
    assert model.config.vision_config._attn_implementation == "sdpa"


def test_a_vision_tower_under_the_name_is_that_of_sdpa():
    model = tiny_model("qwen2-vl")
    given = video_prompt()
    model.set_attn_implementation("sdpa")
    expected, _ = generate(model, given)
    with xattn_video.register_attention(NEARLY_ALL, name="xattention-all", **SMALL) as handle:
        model.set_attn_implementation("xattention-all")
        found, _ = generate(model, given)
        model.set_attn_implementation("sdpa")
    assert torch.equal(found, expected)
    # One call for each pair of frames.
    assert handle.report().layers[-1].dense == {"not causal": 4}


def test_gaps_packed_positions_and_own_masks_run_dense(llama):
    given = prompt()
    gaps = torch.ones_like(given["input_ids"])
    gaps[0, 100:120] = 0
    packed = torch.cat([torch.arange(120), torch.arange(180)])[None]
    own = torch.ones(300, 300, dtype=torch.bool).tril()[None, None]
    cases = {
        "gaps": {"attention_mask": gaps},
        "other mask": {"position_ids": packed, "use_cache": False},
        "own": {"attention_mask": own},
    }
    for reason, more in cases.items():
        llama.set_attn_implementation("sdpa")
        with torch.no_grad():
            expected = llama(**given, **more).logits
            with enable_xattention(llama, 0.5, **SMALL) as handle:
                found = llama(**given, **more).logits
        assert torch.equal(found, expected)
        reason = {"own": "other mask"}.get(reason, reason)
        assert handle.report().dense_reasons == {reason: 2}


def test_gradients_run_dense_with_one_warning(llama):
    with enable_xattention(llama, 0.5, **SMALL) as handle:
        with pytest.warns(UserWarning, match="runs dense because gradients are enabled"):
            llama(**prompt())
        with warnings.catch_warnings(action="error"):
            llama(**prompt())
    assert handle.report().dense_reasons == {"gradients": 4}
    assert decisions(handle.report()) == {"gradients": 2}


def test_few_tokens_run_dense(llama):
    with enable_xattention(llama, 0.5, **{**SMALL, "min_tokens": None}) as handle:
        generate(llama, prompt())
    assert handle.report().dense_reasons == {"too few tokens": 2, "decode": 4}
    assert handle.report().summary() == (
        "0/2 layers sparse over 0 tokens, layer runs that were dense: too few tokens 2, "
        "decode 4, 0 refused"
    )


def test_few_tokens_in_a_static_cache_need_no_mask_of_all_its_keys(llama, monkeypatch):
    """A chunk of 32,768 queries before a cache of a million keys would take 32 GiB."""
    from transformers import StaticCache

    made = []
    monkeypatch.setattr("xattn_video.language.prefill_attention.sdpa_mask", made.append)
    cache = StaticCache(config=llama.config, max_cache_len=2000)
    with enable_xattention(llama, 0.5, **{**SMALL, "min_tokens": 1000}) as handle:
        hidden_states(llama, prompt(300)["input_ids"], 100, cache)
    assert handle.report().dense_reasons == {"too few tokens": 6}
    assert decisions(handle.report()) == {"too few tokens": 3}
    assert made == []


def test_attention_weights_are_not_returned(llama):
    with enable_xattention(llama, 0.5, **SMALL), torch.no_grad():
        out = llama(**prompt(), output_attentions=True)
    assert not out.attentions or all(one is None for one in out.attentions)


def test_decoding_with_a_static_cache_compiles_whole(llama):
    from transformers import StaticCache

    cache = StaticCache(config=llama.config, max_cache_len=320)
    given = prompt()
    with enable_xattention(llama, 0.5, **SMALL) as handle, torch.no_grad():
        llama(**given, **{CACHE: cache}, use_cache=True)
        compiled = torch.compile(llama, backend="eager", fullgraph=True)
        for _ in range(3):
            compiled(given["input_ids"][:, :1], **{CACHE: cache}, use_cache=True)
    report = handle.report()
    assert decisions(report)["sparse"] == 1
    assert report.compiled
    assert "compiled code ran dense and is not counted" in report.summary()


def test_compiled_layers_are_told_when_their_masks_were_made_before(llama):
    """As `generate` makes them where it compiles decoding."""
    attention = llama.model.layers[0].self_attn
    query, key = torch.randn(1, 4, 1, 16), torch.randn(1, 2, 40, 16)
    with enable_xattention(llama, 0.5, **SMALL) as handle, torch.no_grad():
        attend = torch.compile(handle._attention.attend, backend="eager", fullgraph=True)
        attend(attention, query, key, key, None, dropout=0.0, scaling=0.25)
    assert handle.report().compiled
    assert handle.report().dense_reasons == {}


def test_compiled_prefill_runs_dense_and_the_report_tells(llama):
    given = prompt()
    llama.set_attn_implementation("sdpa")
    with torch.no_grad():
        expected = llama(**given, use_cache=False).logits
        with enable_xattention(llama, 0.5, **SMALL) as handle:
            found = torch.compile(llama, backend="eager")(**given, use_cache=False).logits
    torch.testing.assert_close(found, expected, atol=TOLERANCE, rtol=0)
    assert handle.report().compiled
    assert handle.report().sparse_layers == ()


def test_first_layers_can_stay_dense(llama):
    with enable_xattention(llama, 0.5, dense_layers=1, **SMALL) as handle:
        generate(llama, prompt(300, 2, (0, 20)), prefill_chunk_size=96)
    report = handle.report()
    assert report.sparse_layers == (1,)
    assert report.layers[0].dense == {"dense layer": 3, "short chunk": 1, "decode": 2}


def test_layers_and_heads_have_their_own_thresholds(llama):
    schedule = ThresholdSchedule(((0, 0.3),), layers={1: ((0, 0.9),)}, heads={(0, 0): ((0, 1.0),)})
    given = prompt()
    with enable_xattention(llama, 0.3, **SMALL) as low, torch.no_grad():
        llama(**given)
    with enable_xattention(llama, schedule, **SMALL) as handle, torch.no_grad():
        llama(**given)
    uniform, own = low.report().layer_densities(), handle.report().layer_densities()
    # Three heads as before, and one that keeps all.
    assert own[0] > uniform[0] + 0.1
    assert own[1] > own[0]


def test_a_layer_with_tau_1_runs_dense(llama):
    schedule = ThresholdSchedule(((0, 0.3),), layers={1: ((0, 1.0),)})
    with enable_xattention(llama, schedule, **SMALL) as handle, torch.no_grad():
        llama(**prompt())
    assert handle.report().sparse_layers == (0,)
    assert handle.report().layers[1].dense == {"threshold 1": 1}


@pytest.mark.parametrize(
    ("name", "layers", "dense_layers"),
    [("llama", (0, 1), 0), ("llama", (1,), 1), ("gemma3", (1,), 0)],
)
def test_a_forward_pass_without_a_sparse_layer_is_not_sparse(name, layers, dense_layers):
    """Only layer 1 of this Gemma 3 has full attention."""
    schedule = ThresholdSchedule(((0, 0.3),), layers=dict.fromkeys(layers, ((0, 1.0),)))
    model = tiny_model(name)
    with (
        enable_xattention(model, schedule, dense_layers=dense_layers, **SMALL) as handle,
        torch.no_grad(),
    ):
        model(**prompt())
    assert handle.report().sparse_tokens == 0
    assert decisions(handle.report())["threshold 1"] == 1


def test_a_share_of_blocks_in_place_of_a_threshold(llama):
    with enable_xattention(llama, density=0.25, **SMALL) as handle, torch.no_grad():
        llama(**prompt())
    # Sink and diagonal are kept anyway.
    assert 0.2 < handle.report().density < 0.4


@pytest.mark.gpu
@pytest.mark.parametrize("how", ["plain", "chunks", "static chunks"])
def test_generation_on_a_gpu_is_near_sdpa(how):
    """By the backend that `auto` takes there, in bfloat16 and with blocks of 128."""
    config = tiny_model("llama").config
    config.update({"hidden_size": 256, "head_dim": 64, "num_attention_heads": 4})
    model = LlamaForCausalLM(config).eval().to("cuda", torch.bfloat16)
    given = {name: ids.cuda() for name, ids in prompt(1500).items()}
    chunk = {"prefill_chunk_size": 512} if "chunks" in how else {}
    options = {**HOWS[how], **chunk}
    exact = model.float()
    exact.set_attn_implementation("sdpa")
    _, expected = generate(exact, given, **options)
    model = model.bfloat16()
    _, of_sdpa = generate(model, given, **options)
    with enable_xattention(model, NEARLY_ALL, min_tokens=256) as handle:
        _, found = generate(model, given, **options)
    assert handle.report().sparse_layers == (0, 1)
    # As for any tensor: at most twice SDPA's own error in the same precision.
    budget = 2 * (of_sdpa[0] - expected[0]).abs().max() + 2**-8 * expected[0].abs().max()
    assert (found[0] - expected[0]).abs().max() <= budget
