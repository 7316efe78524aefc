"""What docs/long_context.md shows works: code, commands, and the reasons that it lists."""

import json
import re
import shlex
from pathlib import Path
from typing import get_args

import pytest
import torch
from command_line import run_cli
from language_models import SMALL, prompt, tiny_model

from xattn_video import enable_xattention
from xattn_video.language.masks import DenseMaskReason

PAGE = (Path(__file__).parents[1] / "docs/long_context.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)


def test_its_snippets_run_one_after_the_other(monkeypatch):
    """As they stand, but on a tiny model and its prompt."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, BatchEncoding

    def from_pretrained(name, attn_implementation="sdpa", **_):
        assert name == "Qwen/Qwen2.5-7B-Instruct-1M"
        model = tiny_model("qwen2")
        model.set_attn_implementation(attn_implementation)
        return model

    def tokenizer(text, return_tensors):
        return BatchEncoding({"input_ids": torch.randint(3, 100, (1, 300))})

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", from_pretrained)
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda name: tokenizer)
    namespace = {}
    first, second = blocks("python")
    exec(compile(first, "first", "exec"), namespace)
    assert namespace["output"].shape[1] > 300
    assert namespace["handle"].report().dense_reasons["too few tokens"] == 2
    exec(compile(second, "second", "exec"), namespace)
    assert namespace["model"].config._attn_implementation == "xattention"
    namespace["xattn_video"].register_attention().disable()


def test_compiled_layers_run_sparse_as_it_says():
    assert "If its layers are compiled\none by one, they run sparse and are counted." in PAGE
    model, given = tiny_model("llama"), prompt()
    with torch.no_grad(), enable_xattention(model, 0.5, **SMALL) as handle:
        for layer in model.model.layers:
            layer.compile(backend="eager")
        model(**given)
    assert handle.report().sparse_layers == (0, 1)
    assert not handle.report().compiled


def commands() -> list[list[str]]:
    lines = [line for block in blocks("bash") for line in block.splitlines()]
    return [shlex.split(line, comments=True) for line in lines if line.startswith("xattn-video")]


@pytest.fixture(scope="module")
def shown():
    code, out, err = run_cli("prefill", "--help")
    assert code == 0, err
    return out


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_its_commands_have_the_options(words, shown):
    assert words[1] == "prefill"
    for option in words[2:]:
        assert not option.startswith("--") or option in shown


def test_it_lists_every_reason():
    listed = re.findall(r"^\| (`.*?`) \|", PAGE, re.MULTILINE)
    assert {f"`{reason}`" for reason in get_args(DenseMaskReason)} <= {*listed}


def test_its_schedule_does_what_it_says(tmp_path, monkeypatch):
    """The file, the command and the table as they stand there."""
    monkeypatch.chdir(tmp_path)
    (schedule,) = blocks("json")
    Path("schedule.json").write_text(schedule)
    (words,) = (words for words in commands() if "--schedule" in words)
    code, out, err = run_cli(*words[1:])
    assert code == 0, err
    (table,) = blocks("text")
    out = out.removesuffix("\nreport     run.json\n")
    expected, found = (
        [line.split(maxsplit=3) for line in text.splitlines()[-7:]] for text in (table, out)
    )
    assert "'4816235' found" in out
    record = json.loads(Path("run.json").read_text())
    assert record["settings"]["threshold"]["heads"] == json.loads(schedule)["heads"]
    layers = record["runs"]["sparse"]["report"]["layers"]
    densities = {one["layer"]: one["density"] for one in layers if one["density"] is not None}
    assert [(one[0], one[1], one[-1]) for one in found] == [
        (one[0], one[1], one[-1]) for one in expected
    ]
    shown = {int(one[0]): float(one[2]) for one in expected[1:] if int(one[0]) > 1}
    assert densities == pytest.approx(shown, abs=0.01)


def test_a_schedule_changes_the_layers_that_it_says():
    """The figures that its text compares with."""
    words = next(words for words in commands() if "--schedule" in words)
    options = ["--dense-layers=2", "--json", "-q"]
    code, out, err = run_cli(*words[1 : words.index("--schedule")], *options)
    assert code == 0, err
    layers = json.loads(out)["runs"]["sparse"]["report"]["layers"]
    text = re.search(r"it is ([\d.]+) in layer 2 and ([\d.]+) in layer 5", PAGE)
    for layer, figure in zip((2, 5), text.groups(), strict=True):
        assert layers[layer]["density"] == pytest.approx(float(figure), abs=0.01)
