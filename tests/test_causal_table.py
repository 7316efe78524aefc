"""The tables of causal attention and of decoding, and the benchmark of decoding."""

import json

import pytest
from language_models import tiny_model

from benchmarks import causal_table, decode
from xattn_video.language.model_sources import LanguageSource

COMMON = {"heads": 32, "key_heads": 8, "head_dim": 128, "dtype": "bfloat16", "stride": 16}
PLACE = {"gpu": "H100", "versions": {"torch": "2.11.0", "diffusers": None}, "command": "python x"}


def rows_of(tokens, density, milliseconds):
    """One dense kernel and both backends; scoring, selection and attention take 2, 1 and 5 ms."""
    same = {"problem": f"llama-8b-{tokens // 1024}k", "n": tokens, "inputs": "random", **COMMON}
    chosen = {"threshold": density, "wanted_density": density, "density": density}
    chosen |= {"precision": "auto"}
    return [
        same | {"name": "scoring", "backend": None, "precision": "auto", "latency_ms": 2.0},
        same | chosen | {"name": "selection", "backend": None, "latency_ms": 1.0},
        same | chosen | {"name": "attention", "backend": "flash4", "latency_ms": 5.0},
        same | chosen | {"name": "xattention", "backend": "flash4", "latency_ms": milliseconds},
        same | chosen | {"name": "xattention", "backend": "triton", "latency_ms": 10.0},
    ]


def dense_row(tokens, milliseconds):
    (row, *_) = rows_of(tokens, 0.1, 1.0)
    return row | {"name": "dense", "backend": "flash-attn-4", "latency_ms": milliseconds}


@pytest.fixture
def results(tmp_path, monkeypatch):
    """A folder of results; call it to write a file."""
    monkeypatch.setattr(causal_table, "RESULTS", tmp_path)
    (tmp_path / "causal").mkdir()

    def write(name, rows):
        content = PLACE | {"rows": rows}
        (tmp_path / "causal" / name).write_text(json.dumps(content))

    return write


def test_a_table_for_each_density_with_the_best_dense_kernel(results):
    long = [dense_row(131072, 90.0), dense_row(131072, 200.0), *rows_of(131072, 0.07, 20.0)]
    short = [dense_row(8192, 4.0), *rows_of(8192, 0.07, 8.0), *rows_of(8192, 0.5, 2.0)]
    results("attention.json", long + short)
    lines = causal_table.render().splitlines()
    assert [line for line in lines if line.startswith("| 8,192")] == [
        "| 8,192 | 0.070 | flash-attn-4, 4 | 2 | 1 | 5 | 8 | 0.50x | 0.40x | 1.5x (0.44) |",
        "| 8,192 | 0.500 | flash-attn-4, 4 | 2 | 1 | 5 | 2 | 2.00x | 0.40x |",
    ]
    assert (
        "| 131,072 | 0.070 | flash-attn-4, 90 | 2 | 1 | 5 | 20 | 4.50x | 9.00x | 11.7x (0.07) |"
        in lines
    )
    assert lines[0].endswith("| with `triton` | paper (density) |")
    assert (
        "stride 16, backend `flash4` unless named; milliseconds; H100: torch 2.11.0" in lines[-1]
    )


def test_without_a_run_the_page_says_so(results):
    assert causal_table.render() == "No run of either is committed yet.\n"


def test_decoding_shows_both_attentions(results, tmp_path, monkeypatch, capsys):
    model = tiny_model("llama")
    monkeypatch.setattr(LanguageSource, "load", lambda self, dtype, device: model)
    output = tmp_path / "causal" / "decode.json"
    results("none.json", [])
    (tmp_path / "causal" / "none.json").unlink()
    words = ["--model", "random:tiny", "--tokens", "20", "--rounds", "3", "--steps", "2"]
    decode.main([*words, "--device", "cpu", "--output", str(output)])
    (row,) = json.loads(output.read_text())["rows"]
    assert row["sdpa_ms"] > 0
    assert row["xattention_ms"] > 0
    assert model.config._attn_implementation == "sdpa"
    text = causal_table.render()
    assert "| random:tiny |" in text
    assert "- 3 rounds of 2 tokens each in turns, after 20 tokens, float32; the times are " in text


def test_the_ratio_is_that_of_neighbouring_rounds():
    """A machine that slows down half-way slows both."""
    seconds = {"sdpa": [1.0, 1.0, 4.0, 4.0], "xattention": [1.1, 1.1, 4.4, 4.4]}
    found = decode.summarise(seconds, steps=2)
    assert found["ratio"] == pytest.approx(1.1)
    assert found["sdpa_ms"] == pytest.approx(1250)


def test_every_round_decodes_after_the_one_before():
    model = tiny_model("llama")
    lengths = []
    model.register_forward_pre_hook(lambda module, args: lengths.append(args[0].shape[1]))
    seconds = decode.time_rounds(model, 20, rounds=2, steps=3)
    assert lengths == [20, *[1] * (2 * 3 * (2 + decode._WARM_UP_ROUNDS))]
    assert {name: len(times) for name, times in seconds.items()} == {"sdpa": 2, "xattention": 2}
