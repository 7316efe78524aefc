"""The language model called demo: found in the package wherever a language model is named."""

import json
import socket
import subprocess
import sys
from importlib import import_module

import pytest
from command_line import run_cli
from typer.testing import CliRunner

from benchmarks import decode

SPARSE = ["--block-size=16", "--min-tokens=64", "--device=cpu"]


@pytest.fixture
def no_network(monkeypatch):
    """Fail the test if anything is looked up."""

    def refuse(*words, **_):
        raise AssertionError(f"the network was asked for {words}")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)


def harness(name, folder, *words):
    app = import_module(f"eval_language.{name}").app
    words = [f"--run={folder}", "--model=demo", "--device=cpu", "--dtype=float32", *words]
    return CliRunner().invoke(app, words)


@pytest.mark.usefixtures("tiny_demo", "no_network")
def test_prefill_fills_its_context_and_asks_for_a_number(tmp_path):
    report = tmp_path / "run.json"
    code, out, err = run_cli("prefill", "--model=demo", *SPARSE, f"--report={report}")
    assert code == 0, err
    written = json.loads(report.read_text())
    assert written["model"] == "demo"
    # Of 2,048 tokens the answer may take 15.
    assert written["tokens"] == 2033
    assert written["runs"]["sparse"]["needle"] == "4816235"
    assert "'4816235' not found" in out
    assert "warning" not in err


@pytest.mark.usefixtures("tiny_demo")
@pytest.mark.parametrize("needle", ["two grey owls", "123"])
def test_a_needle_that_it_has_not_learned_warns(needle):
    words = ["--model=demo", "--tokens=800", "--plan", f"--needle={needle}"]
    code, _, err = run_cli("prefill", *words)
    assert code == 0
    assert "learned to find numbers of seven digits alone; use --needle 4816235." in err


@pytest.mark.usefixtures("tiny_demo")
def test_a_folder_of_that_name_is_another_model(tmp_path, monkeypatch):
    (tmp_path / "demo").mkdir()
    monkeypatch.chdir(tmp_path)
    assert run_cli("prefill", "--model=demo", "--plan")[0] == 0
    code, _, err = run_cli("prefill", "--model=./demo", "--plan")
    assert code == 2
    assert "the folder './demo' has no config.json" in err


def test_an_installation_without_it_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr("xattn_video.language.model_sources.DEMO_FOLDER", tmp_path / "demo")
    code, out, err = run_cli("prefill", "--model=demo")
    assert (code, out) == (2, "")
    assert f"files are missing, expected {tmp_path / 'demo/config.json'}; reinstall" in err
    assert err.count("\n") == 1


@pytest.mark.usefixtures("tiny_demo", "no_network")
def test_the_loss_on_a_text_needs_no_network(tmp_path):
    words = ["--tokens=512", "--samples=2", "--settings=0.5:8"]
    done = harness("perplexity", tmp_path / "run", *words)
    assert done.exit_code == 0, done.stderr
    dense, sparse = json.loads((tmp_path / "run/report.json").read_text())["results"]
    assert set(dense["scores"]) == {"0", "1"}
    assert sparse["density"] < 1


@pytest.mark.slow
def test_the_real_harness_scores_it_without_a_network(tiny_llm, tmp_path):
    pytest.importorskip("lm_eval", reason="the harness; pip install 'lm_eval[ruler]'")
    words = [f"--run={tmp_path / 'run'}", "--model=demo", "--device=cpu", "--dtype=float32"]
    words += ["--tasks=niah_single_1", "--lengths=1500", "--samples=1", "--settings=0.5:8"]
    code = f"""
import pathlib, socket, sys
from eval_language.ruler import app
from xattn_video.language import model_sources
def refuse(*words, **_):
    raise OSError("no network")
socket.getaddrinfo = refuse
model_sources.DEMO_FOLDER = pathlib.Path({str(tiny_llm)!r})
sys.argv[1:] = {words}
app()
"""
    # Of its own process: the harness keeps the streams that it finds when it is imported.
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "run/report.json").read_text())
    assert [one["scores"] for one in report["results"]] == [{"0": 0.0}, {"0": 0.0}]


@pytest.mark.usefixtures("tiny_demo")
def test_it_sees_no_videos(harnesses, tmp_path):
    done = harness("videomme", tmp_path / "run")
    assert done.exit_code == 2
    assert "the demo language model sees no videos; use a model that does" in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.usefixtures("tiny_demo")
def test_its_decoding_is_timed(tmp_path):
    output = tmp_path / "decode.json"
    words = ["--model=demo", "--tokens=64", "--rounds=1", "--steps=2", "--device=cpu"]
    decode.main([*words, "--commit=none", f"--output={output}"])
    (row,) = json.loads(output.read_text())["rows"]
    assert row["model"] == "demo"
