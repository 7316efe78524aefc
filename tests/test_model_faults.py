"""Damaged or unsuitable folders of language models: one line with a remedy, and exit code 2."""

import json
import shutil
from importlib import import_module

import pytest
import torch
from command_line import run_cli
from language_models import tiny_model
from typer.testing import CliRunner

from xattn_video.language.model_faults import one_line
from xattn_video.language.model_sources import LanguageSource, find_language_model


def change(folder, **values):
    """Change values of config.json; None takes one away."""
    file = folder / "config.json"
    content = json.loads(file.read_text()) | values
    file.write_text(json.dumps({key: one for key, one in content.items() if one is not None}))


def shard(folder):
    """Write the weights as two files and an index."""
    model = find_language_model(str(folder), 0).load(torch.float32, torch.device("cpu"))
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="200KB")
    assert len(list(folder.glob("model-*"))) == 2


def lose_shard(folder):
    shard(folder)
    (folder / "model-00002-of-00002.safetensors").unlink()


def break_index(folder):
    shard(folder)
    (folder / "model.safetensors.index.json").write_text("{]")


def lose_weights(folder):
    (folder / "model.safetensors").unlink()


def truncate(name):
    def cut(folder):
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: len(content) // 2])

    return cut


def pickle_half(folder):
    (folder / "model.safetensors").unlink()
    torch.save({"one": torch.ones(1000)}, folder / "pytorch_model.bin")
    truncate("pytorch_model.bin")(folder)


def lose_tokenizer(folder):
    for file in folder.glob("tokenizer*"):
        file.unlink()


def write(name, text):
    return lambda folder: (folder / name).write_text(text)


FAULTS = {
    "truncated weights": (
        truncate("model.safetensors"),
        "model.safetensors is damaged or truncated at",
    ),
    "empty weights": (write("model.safetensors", ""), "model.safetensors is empty; download"),
    "no weights": (lose_weights, "has no weights, model.safetensors or pytorch_model.bin: found"),
    "a missing shard": (lose_shard, "model-00002-of-00002.safetensors is missing from the model;"),
    "a broken index": (break_index, "model.safetensors.index.json is not valid JSON ("),
    "truncated pickled weights": (pickle_half, "pytorch_model.bin is damaged or truncated at"),
    "a layer without weights": (
        lambda folder: change(folder, num_hidden_layers=3),
        "do not fit its config.json: 9 tensors are missing, such as model.layers.2.input_lay",
    ),
    "weights of another shape": (
        lambda folder: change(folder, intermediate_size=32),
        "model.layers.0.mlp.down_proj.weight is [64, 64], expected [64, 32]; take both from one",
    ),
    "a tokenizer of more tokens": (
        lambda folder: change(folder, vocab_size=100, bos_token_id=1, eos_token_id=2),
        "has 258 tokens, but the model has embeddings of 100; take the tokenizer and the weights",
    ),
    "no model_type": (
        lambda folder: change(folder, model_type=None),
        "config.json has no model_type, which names the kind of model, got None; give a folder",
    ),
    "an unknown model_type": (
        lambda folder: change(folder, model_type="zzz"),
        "has model type 'zzz', which transformers",
    ),
    "a broken configuration": (write("config.json", "{]"), "config.json is not valid JSON ("),
    "a list as configuration": (write("config.json", "[1]"), "must hold a JSON object, got list;"),
    "no attention heads": (
        lambda folder: change(folder, num_attention_heads=0),
        "does not describe a llama model: ",
    ),
    "heads of another type": (
        lambda folder: change(folder, num_attention_heads="four"),
        "expected int, got str (value: 'four'); download it again.",
    ),
    "no width": (
        lambda folder: change(folder, intermediate_size=-1),
        "describes no model that can be made: ",
    ),
    "no tokenizer": (lose_tokenizer, "has no tokenizer that can be read: the folder has none of"),
    "a broken tokenizer": (truncate("tokenizer.json"), "tokenizer.json is not valid JSON ("),
    "a broken tokenizer's configuration": (
        write("tokenizer_config.json", "{]"),
        "tokenizer_config.json is not valid JSON (",
    ),
    "another tokenizer": (
        write("tokenizer.json", '{"added_tokens": [], "model": {"type": "none"}}'),
        "has no tokenizer that can be read: ",
    ),
}


@pytest.fixture
def folder(tiny_llm, tmp_path):
    """A copy of the tiny language model, to damage."""
    return shutil.copytree(tiny_llm, tmp_path / "model")


def prefill(folder, *words):
    options = ("--tokens=500", "--min-tokens=0", "--device=cpu", *words)
    return run_cli("prefill", f"--model={folder}", *options)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_one_line(fault, folder):
    damage, text = FAULTS[fault]
    damage(folder)
    code, _, err = prefill(folder)
    assert code == 2, err
    assert text in err
    assert err.count("\n") == 1
    assert err.startswith("error: ")


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("name", ["ruler", "longbench", "perplexity"])
def test_a_fault_is_one_line_in_a_harness(name, fault, folder, harnesses, tmp_path):
    damage, text = FAULTS[fault]
    damage(folder)
    app = import_module(f"eval_language.{name}").app
    own = {
        "ruler": ["--tasks=ruler_vt", "--lengths=1024"],
        "longbench": ["--tasks=ruler_vt"],
        "perplexity": ["--tokens=512"],
    }[name]
    words = [
        f"--run={tmp_path / 'run'}",
        f"--model={folder}",
        "--device=cpu",
        "--samples=1",
        "--quiet",
    ]
    result = CliRunner().invoke(app, [*words, *own])
    assert result.exit_code == 2, result.stderr
    assert text in result.stderr
    assert result.stderr.count("\n") == 1
    assert not list(tmp_path.glob("run/items/*.json"))


def test_anothers_error_ends_with_a_sentence():
    first = "We couldn't connect to 'https://huggingface.co' to load the files."
    assert one_line(OSError(f"{first}\nCheck your connection. {'Read this. ' * 40}")).endswith(
        "Read this"
    )
    assert one_line(OSError(f"{first} {'x' * 300}")) == first.rstrip(".")
    assert one_line(OSError("y " * 300)).endswith(" [...]")
    assert len(one_line(OSError(f"{first} {'Read this. ' * 40}"))) <= 200
    assert one_line(OSError()) == "OSError"


def test_damage_in_the_hubs_cache_is_one_line(folder, monkeypatch):
    """There transformers reads first."""
    truncate("model.safetensors")(folder)
    monkeypatch.setattr(LanguageSource, "check_files", lambda source: None)
    code, _, err = prefill(folder)
    assert code == 2, err
    assert "are damaged: Error while deserializing header" in err
    assert err.endswith("; download it again.\n")


def test_weights_that_the_hub_does_not_give_are_one_line(folder, harnesses, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise OSError("We couldn't connect to 'https://huggingface.co'.\nCheck your connection.")

    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", fail)
    run = [f"--run={tmp_path / 'run'}", f"--model={folder}", "--device=cpu", "--tokens=512", "-q"]
    result = CliRunner().invoke(import_module("eval_language.perplexity").app, run)
    for code, _, err in (prefill(folder), (result.exit_code, "", result.stderr)):
        assert code == 2, err
        assert f"the weights of '{folder}' cannot be loaded: We couldn't connect to " in err
        assert err.splitlines()[-1].startswith("error: ")


def test_whole_weights_are_read_beside_a_stale_index(folder):
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"one": "gone"}}')
    assert prefill(folder)[0] == 0


def test_shards_are_read(folder):
    shard(folder)
    assert prefill(folder)[0] == 0


def test_a_plan_needs_no_weights(folder):
    lose_weights(folder)
    assert prefill(folder, "--plan")[0] == 0


def test_added_tokens_may_lie_beyond_the_embeddings(folder):
    """As in fine-tuned models whose padding token was never given an embedding."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"pad_token": "<never in a text>"})
    tokenizer.save_pretrained(folder)
    assert prefill(folder)[0] == 0


@pytest.mark.parametrize("name", ["gpt2", "opt", "gptj"])
def test_a_table_of_positions_cannot_be_exceeded(name, folder):
    """With or without --beyond-context, which is not offered."""
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 64}
    config = AutoConfig.for_model(name, vocab_size=300, max_position_embeddings=512, **sizes)
    config.bos_token_id, config.eos_token_id, config.pad_token_id = 1, 2, 0
    if name == "opt":
        config.word_embed_proj_dim = 64
    if name == "gptj":
        config.rotary_dim = 8
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    assert prefill(folder, "--needle=owls", "--tokens=480")[0] == 0
    for words in ((), ("--beyond-context",)):
        code, _, err = prefill(folder, "--tokens=600", *words)
        assert code == 2, err
        assert "context is 512 tokens, got 600 and" in err
        assert err.endswith(" or fewer; its positions are a table that ends there.\n")
        assert err.count("\n") == 1


def test_prompts_that_overshoot_need_room_in_a_table_of_positions(folder, harnesses, tmp_path):
    tiny_model("gpt2").save_pretrained(folder)
    change(folder, vocab_size=300)
    lose_weights(folder)
    model = find_language_model(str(folder), 0)
    assert model.ends_with_context()
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_config(model.config).save_pretrained(folder)
    app = import_module("eval_language.ruler").app
    words = [f"--run={tmp_path / 'run'}", f"--model={folder}", "--lengths=2000", "--device=cpu"]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 2
    assert result.stderr.endswith("got a length of 2,000; use --lengths 1792 or fewer.\n")


def test_a_model_without_attention_is_refused(tmp_path):
    from transformers import MambaConfig

    MambaConfig().save_pretrained(tmp_path)
    code, _, err = prefill(tmp_path)
    assert code == 2
    assert f"'{tmp_path}' has no attention heads; use a language model with attention." in err


@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma3", "llama4", "deepseek-v3"])
def test_a_model_without_a_table_loads_and_may_exceed_its_context(name, tmp_path):
    tiny_model(name).save_pretrained(tmp_path)
    source = find_language_model(str(tmp_path), 0)
    assert not source.ends_with_context()
    source.load(torch.float32, torch.device("cpu"))
