"""`xattn-video prefill`: plan, needle, chunks, the comparison with dense, and bad input."""

import json
import os
import subprocess
import warnings
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from command_line import run_cli
from language_models import tiny_model

from benchmarks import decode
from xattn_video.cli.prefill_job import PrefillJob
from xattn_video.language import needle as needles
from xattn_video.language.long_prompt import run_prefill
from xattn_video.language.prefill_settings import PrefillSettings

ROOT = Path(__file__).parents[1]
RANDOM = ["--model=random:tiny", "--tokens=640", "--chunk-size=256", "--device=cpu"]
SPARSE = ["--block-size=16", "--min-tokens=64"]


@pytest.fixture
def no_weights(monkeypatch):
    """Fail the test if a model is loaded."""

    def refuse(*_):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr("xattn_video.language.model_sources.LanguageSource.load", refuse)


def test_random_weights_are_timed_and_marked(tmp_path):
    report = tmp_path / "run.json"
    code, out, err = run_cli(
        "prefill", *RANDOM, *SPARSE, "--density=0.3", "--compare=dense", f"--report={report}"
    )
    assert code == 0, err
    assert "warning: Speed and memory only: the weights are random." in err
    assert err.count("tokens, chunk") == 6
    assert "x as fast as dense" in out
    assert "KL divergence" not in out
    assert "answer" not in out
    written = json.loads(report.read_text())
    assert written["speed_only"] == "the weights are random"
    assert set(written["versions"]) >= {"torch", "transformers"}
    sparse, dense = written["runs"]["sparse"], written["runs"]["dense"]
    assert len(sparse["chunk_seconds"]) == 3
    assert sparse["seconds"] == pytest.approx(sum(sparse["chunk_seconds"]))
    assert written["speedup"] == pytest.approx(dense["seconds"] / sparse["seconds"])
    assert [one["sparse"] for one in sparse["report"]["layers"]] == [3, 3]
    assert 0.25 < sparse["report"]["density"] < 0.5
    assert {*dense["report"]["dense_reasons"]} == {"threshold 1", "decode"}
    assert written["settings"]["density"] == 0.3
    assert "found" not in sparse


def test_json_is_what_the_report_holds_and_quiet_hides_the_chunks(tmp_path):
    report = tmp_path / "run.json"
    words = [*RANDOM, *SPARSE, "--json", "-q", f"--report={report}"]
    for replaced in (False, True):
        code, out, err = run_cli("prefill", *words)
        assert code == 0, err
        written = {"report": str(report), "replaced": replaced}
        assert json.loads(out) == json.loads(report.read_text()) | written
        assert err == "warning: Speed and memory only: the weights are random.\n"


def test_a_plan_is_reported_too_and_a_replaced_report_says_so(no_weights, tmp_path):
    report = tmp_path / "run.json"
    for replaced in (False, True):
        words = ("--plan", f"--report={report}", "-q")
        code, out, err = run_cli("prefill", *RANDOM, *SPARSE, *words)
        assert code == 0, err
        assert out.endswith(f"run.json{' (replaced)' if replaced else ''}\n")
        assert json.loads(report.read_text())["runs"] == {}


def test_json_of_a_plan_has_no_runs(no_weights):
    code, out, err = run_cli("prefill", *RANDOM, *SPARSE, "--plan", "--json")
    assert code == 0, err
    assert json.loads(out)["runs"] == {}
    assert json.loads(out)["plan"]["kv_cache"] > 0


def test_the_density_with_dense_layers_is_called_that_of_the_others():
    for options, is_told in (([], False), (["--dense-layers=1"], True)):
        code, out, err = run_cli("prefill", *RANDOM, *SPARSE, *options)
        assert code == 0, err
        assert ("of the sparse layers alone" in out) is is_told


def test_errors_name_options_as_they_are_typed(no_weights):
    code, _, err = run_cli("prefill", *RANDOM, "--block-size=17")
    assert code == 2
    assert err.startswith("error: --stride must divide --block-size, got --stride=8, ")


def test_a_schedule_file_gives_layers_their_own_thresholds(tmp_path):
    schedule, report = tmp_path / "taus.json", tmp_path / "run.json"
    schedule.write_text('{"points": [[0, 0.5]], "layers": {"1": [[0, 1.0]]}}')
    options = [f"--schedule={schedule}", f"--report={report}"]
    code, _, err = run_cli("prefill", *RANDOM, *SPARSE, *options)
    assert code == 0, err
    written = json.loads(report.read_text())
    first, second = written["runs"]["sparse"]["report"]["layers"]
    assert (first["sparse"], second["sparse"]) == (3, 0)
    assert second["dense"]["threshold 1"] == 3
    assert written["settings"]["threshold"]["layers"] == {"1": [[0, 1.0]]}


def test_a_needle_is_hidden_and_asked_for(tiny_llm, tmp_path):
    report = tmp_path / "run.json"
    options = ["--tokens=800", "--chunk-size=256", "--needle=two grey owls", "--device=cpu"]
    code, out, err = run_cli(
        "prefill",
        f"--model={tiny_llm}",
        *options,
        *SPARSE,
        "--compare=dense",
        f"--report={report}",
    )
    assert code == 0, err
    assert "Speed and memory only" not in err
    assert out.count("'two grey owls' not found") == 2
    assert "as dense attention's, KL divergence" in out
    written = json.loads(report.read_text())
    assert written["runs"]["sparse"]["found"] is False
    assert written["kl_divergence"] >= 0
    assert written["settings"]["threshold"] == 0.9


@pytest.mark.parametrize("compare", ["dense", "sdpa"])
def test_at_tau_1_it_says_what_dense_attention_says(tiny_llm, tmp_path, compare):
    report = tmp_path / "run.json"
    options = ["--tokens=800", "--chunk-size=256", "--threshold=0.9999999", "--device=cpu"]
    code, _, err = run_cli(
        "prefill",
        f"--model={tiny_llm}",
        *options,
        *SPARSE,
        f"--compare={compare}",
        f"--report={report}",
    )
    assert code == 0, err
    written = json.loads(report.read_text())
    assert written["kl_divergence"] < 1e-8
    sparse, other = written["runs"].values()
    assert sparse["answer"] == other["answer"]
    assert (other["report"] is None) == (compare == "sdpa")


def test_it_writes_what_generate_writes():
    model = tiny_model("llama")
    tokens = torch.randint(3, 100, (1, 300))
    model.set_attn_implementation("sdpa")
    expected = model.generate(tokens, max_new_tokens=6, do_sample=False, pad_token_id=0)
    settings = PrefillSettings.of(1 - 1e-7, block_size=16, min_tokens=64)
    for size in (96, 1000):
        told = []
        run = run_prefill(
            model,
            tokens,
            settings,
            chunk_size=size,
            max_new_tokens=6,
            on_chunk=lambda number, seconds, told=told: told.append(number),
        )
        assert list(run.new_tokens) == expected[0, 300:].tolist()
        assert run.report.sparse_layers == (0, 1)
        assert told == ([96, 192, 288, 300] if size == 96 else [300])


def test_the_cache_goes_by_the_name_that_this_transformers_calls_it():
    """It has another name from 5.24 on; the old one warns until 5.40 and then is gone."""
    model = tiny_model("llama")
    with warnings.catch_warnings(action="error"):
        run_prefill(model, torch.ones(1, 40, dtype=int), None, chunk_size=20, max_new_tokens=2)
        decode.time_rounds(model, 40, rounds=1, steps=1)


def test_the_prompt_has_the_asked_length_and_holds_the_needle(tiny_llm):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_llm)
    for depth in (0, 0.3, 1):
        tokens = needles.needle_prompt(tokenizer, 1000, "two grey owls", depth)
        assert tokens.shape == (1, 1000)
        text = tokenizer.decode(tokens[0])
        assert text.count("The secret text is: two grey owls.") == 1
        assert text.endswith("What is the secret text? The secret text is:")
        assert abs(text.index("two grey") / 1000 - depth) < 0.2
    with pytest.raises(ValueError, match=r"tokens must be at least \d+ to hide this needle"):
        needles.needle_prompt(tokenizer, 50, "two grey owls", 0.5)


def test_the_beginning_of_a_sequence_is_kept():
    class Begins:
        def __call__(self, text, add_special_tokens=True):
            return {"input_ids": [7] * add_special_tokens + [ord(letter) for letter in text]}

    assert needles.needle_prompt(Begins(), 300, "owls", 0.5)[0, :2].tolist() == [7, ord("T")]


def test_a_prompt_below_min_tokens_warns():
    code, _, err = run_cli("prefill", *RANDOM)
    assert code == 0, err
    assert "Nothing ran sparse (too few tokens, decode); use a longer prompt, or --min-" in err


def test_a_plan_that_does_not_fit_says_so(monkeypatch):
    from xattn_video.cli import prefill_job
    from xattn_video.pipelines.memory import Room

    monkeypatch.setattr(prefill_job, "find_room", lambda load: Room(None, 0.001))
    code, out, err = run_cli("prefill", *RANDOM, "--plan")
    assert code == 0
    assert "0.0 GiB is free" in out
    assert "640 tokens need about" in err
    assert "would fit." in err


def test_chunks_below_a_block_have_another_remedy():
    code, _, err = run_cli("prefill", *RANDOM, "--min-tokens=0", "--chunk-size=100")
    assert code == 0, err
    assert "Nothing ran sparse (short chunk, decode); use chunks of at least a block, 128" in err


@pytest.mark.parametrize(
    ("needle", "answer", "is_found"),
    [("42", "It is 42.", True), ("42", "4211", False), ("owls", "Two OWLS", True)],
)
def test_a_number_is_not_found_within_a_longer_one(needle, answer, is_found, monkeypatch):
    monkeypatch.setattr(PrefillJob, "answer", lambda job, run: answer)
    monkeypatch.setattr(PrefillJob, "needle", needle)
    assert object.__new__(PrefillJob).found(None) is is_found


@pytest.mark.usefixtures("no_weights")
def test_what_cannot_fit_is_refused_before_anything_is_loaded(monkeypatch):
    from xattn_video.pipelines.memory import Room

    monkeypatch.setattr("xattn_video.cli.prefill_job.find_room", lambda load: Room(None, 1.0))
    options = ["--model=random:llama-3-8b", "--tokens=65536", "--dtype=bfloat16", "--device=cpu"]
    code, _, err = run_cli("prefill", *options)
    assert code == 2
    (line,) = [line for line in err.splitlines() if line.startswith("error")]
    assert "65,536 tokens need about" in line
    assert line.endswith("--force runs it anyway.")


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--model=random:gpt-5"], "no shape is called 'gpt-5'; use random: and one of llama-3-"),
        (["--model=random:tiny", "--needle=owl"], "the weights are random; leave --needle out."),
        (["--model=random:tiny", "--tokens=0"], "tokens must be at least 1, got 0"),
        (
            ["--model=random:tiny", "--tokens=\uff14\uff10\uff10"],
            "'--tokens': Input should be a valid integer",
        ),
        (["--model=random:tiny", "--chunk-size=0"], "--chunk-size must be at least 1, got 0"),
        (["--model=random:tiny", "--depth=2"], "depth must lie in [0, 1], got 2; use 0.5."),
        (
            ["--model=random:tiny", "--compare=eager"],
            "compare must be dense or sdpa, got 'eager'.",
        ),
        (["--model=random:tiny", "--needle= "], "needle is empty; give a few words."),
        (["--model=demo", "--needle=\uff14\uff181\uff16"], "got '\uff14\uff181\uff16'; use 4816."),
        (
            ["--model=demo", "--needle=\u0664\u0662"],
            "--needle must have the digits 0 to 9 where it is a nu",
        ),
        (["--model=random:tiny", "--dense-layers=2"], "below the model's 2 layers, got 2"),
        (["--model=random:tiny", "--threshold=9"], "threshold must lie in (0, 1], got 9"),
        (["--model=random:tiny", "--threshold=.9", "--density=.1"], "cannot be combined"),
        (["--model=random:tiny", "--schedule=none.json"], "cannot read the schedule"),
        (["--model=random:tiny", "--report=r.txt"], "report must end in .json, got 'r.txt'"),
        (["--model=random:tiny", "--dtype=int8"], "dtype must be one of float32"),
        (["--model=none.gguf"], "there is no file 'none.gguf'; give the path of a .gguf file."),
        (["--model=."], "the folder '.' has no config.json; give a folder that save_pretrained"),
        (["--model="], "model '' is neither a folder, a .gguf file nor a hub ID; expected 'demo'"),
        ([f"--model={'n' * 300}"], "nnn': File name too long; give a readable folder, a .gguf"),
        (["--model=no/such/model"], "model 'no/such/model' is neither a folder, a .gguf file nor"),
        (["--model=no/model"], "model 'no/model' is neither a folder nor a .gguf file, and the"),
        (["--model={folder}/config.json"], "config.json' is neither a folder, a .gguf file nor"),
        (["--model={folder}", "--tokens=9999"], "the model's context is 2,048 tokens, got 9,999"),
        (["--model={folder}", "--tokens=30"], "tokens must be at least"),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_bad_input_is_one_line(options, text, tiny_llm, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    code, out, err = run_cli(
        "prefill",
        "--device=cpu",
        *[option.format(folder=tiny_llm) for option in options],
    )
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert text in err
    assert list(tmp_path.iterdir()) == []


def test_beyond_the_context_is_marked(tiny_llm):
    options = ["--tokens=2100", "--chunk-size=1050", "--beyond-context", "--device=cpu"]
    code, out, err = run_cli("prefill", f"--model={tiny_llm}", *options)
    assert code == 0, err
    assert "longer than the model's context of 2,048 tokens" in err
    assert "answer" not in out


@pytest.mark.usefixtures("no_weights")
def test_a_model_that_writes_no_text_is_refused(tmp_path):
    from transformers import ViTConfig

    ViTConfig().save_pretrained(tmp_path)
    code, _, err = run_cli("prefill", f"--model={tmp_path}")
    assert code == 2
    assert "is a vit model, which does not continue text by itself" in err


@pytest.mark.usefixtures("no_weights")
def test_a_configuration_that_is_none_is_called_so(tmp_path):
    (tmp_path / "config.json").write_text("{]")
    code, _, err = run_cli("prefill", f"--model={tmp_path}")
    assert code == 2
    assert f"{tmp_path / 'config.json'} is not valid JSON (" in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--scoring-precision=float8", 'scoring precision "float8" is not available'),
        ("--backend=flash4", "attention backend 'flash4' cannot run this problem"),
    ],
)
def test_kernels_that_cannot_run_here_are_refused_before_the_weights(option, message, no_weights):
    code, _, err = run_cli("prefill", *RANDOM, *SPARSE, option)
    assert (code, err.count("Traceback")) == (2, 0)
    assert message in err
    assert run_cli("prefill", *RANDOM, *SPARSE, option, "--plan")[0] == 0


def test_an_older_transformers_is_refused_before_the_plan(monkeypatch):
    monkeypatch.setattr("xattn_video.language.registration._version", "5.3.0")
    code, out, err = run_cli("prefill", *RANDOM)
    assert (code, out) == (2, "")
    assert "needs transformers 5.14 or newer, got 5.3.0" in err


@pytest.mark.usefixtures("no_weights")
def test_a_folder_without_a_tokenizer_is_refused(tiny_llm, tmp_path):
    (tmp_path / "config.json").write_text((tiny_llm / "config.json").read_text())
    code, _, err = run_cli("prefill", f"--model={tmp_path}", "--tokens=500")
    assert code == 2
    assert "has no tokenizer that can be read" in err
    assert err.count("\n") == 1


@pytest.mark.skipif(find_spec("gguf") is not None, reason="gguf is installed")
def test_a_gguf_file_without_its_package_says_what_to_install(tmp_path):
    (tmp_path / "model.gguf").touch()
    code, _, err = run_cli("prefill", f"--model={tmp_path / 'model.gguf'}")
    assert code == 2
    assert err.endswith("needs the package gguf, which is not installed; pip install gguf.\n")


@pytest.mark.parametrize(
    ("words", "model"),
    [
        ((), "demo --dense-layers 2"),
        (("--paper",), "gradientai/Llama-3-8B-Instruct-Gradient-1048k --tokens 450560"),
    ],
)
def test_the_demo_script_passes_its_options_on(words, model, tmp_path):
    stub = tmp_path / "python"
    stub.write_text("#!/bin/sh\necho $PYTORCH_ALLOC_CONF $*\n")
    stub.chmod(0o755)
    done = subprocess.run(
        ["bash", ROOT / "scripts/run_demo.sh", *words, "--tokens", "1048576"],
        capture_output=True,
        text=True,
        env={"PATH": f"{tmp_path}:{os.environ['PATH']}"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == (
        f"expandable_segments:True -m xattn_video prefill --model {model} --chunk-size 32768 "
        "--stride 16 --tokens 1048576\n"
    )
