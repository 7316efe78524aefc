"""`eval_language`: a table of dense and sparse settings, from harnesses that stand-ins replace."""

import json
import subprocess
from importlib import import_module
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

ROOT = Path(__file__).parents[1]
CPU = ["--device=cpu", "--dtype=float32"]


def run(name, *arguments):
    app = import_module(f"eval_language.{name}").app
    result = CliRunner().invoke(app, [str(argument) for argument in (*CPU, *arguments)])
    return result.exit_code, result.stdout, result.stderr


def ruler(folder, model, *arguments):
    tasks = "--tasks=niah_multikey_2,ruler_vt"
    wanted = (f"--run={folder}", f"--model={model}", tasks, "--lengths=1024", "--samples=6")
    return run("ruler", *wanted, *arguments)


def test_every_setting_stands_beside_dense_in_one_table(harnesses, tiny_llm, tmp_path):
    code, out, err = ruler(tmp_path / "run", tiny_llm, "--settings=0.9:8,0.5:16", "-q")
    assert code == 0, err
    assert out.endswith(f"report     {tmp_path / 'run/report.md'}\n")
    report = json.loads((tmp_path / "run/report.json").read_text())
    results = {(one["task"], one["setting"]): one for one in report["results"]}
    assert len(results) == 6
    dense = results["niah_multikey_2, 1024", "dense"]
    sparse = results["niah_multikey_2, 1024", "tau 0.5, stride 16"]
    assert set(dense["scores"]) == {"0", "1", "2", "3", "4", "5"}
    assert dense["density"] is None
    assert 0 < sparse["density"] < 1
    assert "2/2 layers sparse over 2,400 tokens" in sparse["attention"]
    page = (tmp_path / "run/report.md").read_text()
    rows = [line.split("|")[1:-1] for line in page.splitlines() if "stride 16" in line]
    measured = [cell.strip() for cell in rows[0]]
    assert measured[:3] == ["niah_multikey_2, 1024", "tau 0.5, stride 16", "6"]
    assert measured[5].startswith("[")
    # Both tasks together.
    assert rows[2][0].strip() == "all, 1024"
    assert rows[2][2].strip() == "12"
    assert "| XAttention, stride 8 | 96.83 |" in page
    assert "84.96 at stride 8" in page
    assert "Density: of the blocks of the sparse layers alone." in page
    assert (tmp_path / "run/report.html").read_text().count("<table>") == 2


def test_a_setting_may_name_its_dense_layers(harnesses, tiny_llm, tmp_path):
    assert (
        ruler(tmp_path / "run", tiny_llm, "--settings=0.5:8:1,0.5:8", "--dense-layers=0")[0] == 0
    )
    report = json.loads((tmp_path / "run/report.json").read_text())
    found = {one["setting"]: one["attention"] for one in report["results"] if one["attention"]}
    assert "1/2 layers sparse over" in found["tau 0.5, stride 8, 1 dense layer"]
    assert "2/2 layers sparse over" in found["tau 0.5, stride 8"]


def test_attention_is_what_the_setting_says_and_the_models_own_again(
    harnesses, tiny_llm, tmp_path
):
    assert ruler(tmp_path / "run", tiny_llm, "--settings=0.5:8")[0] == 0
    calls = harnesses("lm_eval").CALLS
    assert [name.split("-")[0] for _, name in calls] == ["sdpa", "xattention"] * 2


def test_a_run_resumes_and_refuses_other_settings(harnesses, tiny_llm, tmp_path):
    folder = tmp_path / "run"
    assert ruler(folder, tiny_llm, "--settings=0.5:8")[0] == 0
    calls = harnesses("lm_eval").CALLS
    calls.clear()
    (folder / "items/ruler_vt-1024-tau-0.5-stride-8.json").unlink()
    assert ruler(folder, tiny_llm, "--settings=0.5:8")[0] == 0
    assert [task for task, _ in calls] == ["ruler_vt"]
    code, _, err = ruler(folder, tiny_llm, "--settings=0.6:8")
    assert code == 2
    assert "holds a run with other settings" in err


def test_the_harness_measures_prompts_with_the_models_tokenizer(harnesses, tiny_llm, tmp_path):
    assert ruler(tmp_path / "run", tiny_llm, "--lengths=1024,1100", "--settings=0.5:8")[0] == 0
    given = harnesses("lm_eval.tasks").METADATA
    assert [one["max_seq_lengths"] for one in given] == [[1024], [1100]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--settings=0.9"],
            "--settings must be THRESHOLD:STRIDE or THRESHOLD:STRIDE:DENSE_LAYERS, got '0.9'; use "
            "0.9:8,0.9:16.",
        ),
        (["--settings=0.9:8:1:1"], "got '0.9:8:1:1'; use 0.9:8,0.9:16."),
        (["--samples=0"], "--samples must be at least 1, got 0; use 100."),
        (["--settings=0.9:8,0.90:8"], "--settings must differ, got tau 0.9, stride 8 twice;"),
        (["--settings=2:8"], "settings '2:8': threshold must lie in (0, 1], got 2.0"),
        (
            ["--settings=\uff10.\uff19:\uff18"],
            "DENSE_LAYERS, got '\uff10.\uff19:\uff18'; use 0.9:8,0.9:16.",
        ),
        (
            ["--lengths=\uff14\uff10\uff10"],
            "--lengths must be numbers, got '\uff14\uff10\uff10'; use 8192,16384.",
        ),
        (["--lengths=-5"], "--lengths must be numbers, got '-5'; use 8192,16384."),
        (["--lengths=4k"], "--lengths must be numbers, got '4k'"),
        (["--lengths=4096"], "the model's context is 2,048 tokens, got a length of 4,096"),
        (["--lengths=0"], "--lengths must be at least 1024, got 0; use 8192,16384."),
        (["--lengths=2048,64"], "--lengths must be at least 1024, got 64; use 8192,16384."),
        (["--tasks=niah_9"], "lm_eval has no task 'niah_9'"),
        (
            ["--tasks=longbench_lsht"],
            "longbench_lsht needs a package that is not installed here: No",
        ),
        (["--tasks=longbench_qasper"], "is not available: Couldn't reach 'Xnhyacinth/LongBench'"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(
    arguments, message, harnesses, tiny_llm, tmp_path
):
    code, out, err = ruler(tmp_path / "run", tiny_llm, "--quiet", *arguments)
    assert code == 2, err
    assert message in err
    assert (err.count("\n"), out) == (1, "")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "wrong",
    [["--settings=0.9:8,0.9:8:2"], ["--dense-layers=2"], ["--tasks=ruler_vt,niah_9"]],
    ids=" ".join,
)
def test_what_the_model_or_the_harness_lacks_is_refused_before_prompts(
    wrong, harnesses, tiny_llm, tmp_path, monkeypatch
):
    """They take minutes to generate."""

    def refuse(*_):
        raise AssertionError("prompts were generated")

    monkeypatch.setattr(harnesses("lm_eval.tasks").TaskManager, "load", refuse)
    code, _, err = ruler(tmp_path / "run", tiny_llm, *wrong)
    assert code == 2, err
    text = "no task 'niah_9'" if "niah" in wrong[0] else "be below the model's 2 layers, got 2;"
    assert text in err
    assert err.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_videomme_refuses_dense_layers_beyond_the_model_before_it_runs_dense(harnesses, tmp_path):
    arguments = ["--settings=0.5:16", "--dense-layers=2", "--samples=4", "--tasks=videomme"]
    code, _, err = run("videomme", f"--run={tmp_path / 'run'}", "--model=any", *arguments)
    assert code == 2, err
    assert "--dense-layers must be below the model's 2 layers, got 2; use fewer." in err
    assert harnesses("lmms_eval.evaluator").IMPLEMENTATIONS == []


def test_a_user_sees_progress_the_table_and_warnings_that_matter(harnesses, tiny_llm, tmp_path):
    """The harness prints hundreds of lines of its own."""
    harnesses("lm_eval").NOISE += [
        "Truncating %s tokens from the left.",
        "Passed an already-initialized model through `pretrained`, number %s",
    ]
    words = ("--tasks=ruler_vt", "--settings=0.5:8")
    code, out, err = ruler(tmp_path / "run", tiny_llm, *words)
    assert code == 0, err
    lines = err.splitlines()
    assert lines[0] == "ruler_vt, 1024: generating prompts"
    assert lines[1:7] == [
        f"  ruler_vt, 1024, dense: {number} of 6 samples" for number in range(1, 7)
    ]
    assert lines[7] == "warning: Truncating 0 tokens from the left. (5 more like this)"
    assert lines[8].startswith("ruler_vt, 1024, dense: ")
    assert len(lines) == 1 + 2 * 8
    assert out.startswith("task            setting ")
    assert "harness" not in out
    assert "tau 0.5, stride 8" in out


def test_many_samples_are_told_by_tenths(harnesses, tiny_llm, tmp_path):
    words = ("--tasks=ruler_vt", "--settings=0.5:8", "--samples=25")
    _, _, err = ruler(tmp_path / "run", tiny_llm, *words)
    told = [line.split(": ")[1] for line in err.splitlines() if line.startswith("  ruler_vt")]
    assert len(told) == 20
    assert told[0] == "3 of 25 samples"
    assert told[9] == "25 of 25 samples"


def test_quiet_leaves_the_table_and_warnings(harnesses, tiny_llm, tmp_path):
    harnesses("lm_eval").NOISE += ["Truncating %s tokens from the left."]
    words = ("--tasks=ruler_vt", "--settings=0.5:8", "--quiet")
    _, out, err = ruler(tmp_path / "run", tiny_llm, *words)
    assert (
        err.splitlines() == ["warning: Truncating 0 tokens from the left. (5 more like this)"] * 2
    )
    assert "tau 0.5, stride 8" in out


def test_verbose_shows_what_the_harness_prints(harnesses, tiny_llm, tmp_path, caplog):
    # Restores the level that --verbose sets.
    caplog.set_level("INFO", logger="xattn_video")
    words = ("--tasks=ruler_vt", "--settings=0.5:8", "--verbose")
    _, out, err = ruler(tmp_path / "run", tiny_llm, *words)
    assert "a table of the harness" in out
    assert "Running generate_until requests" in err


def test_longbench_says_where_its_data_come_from(harnesses, tiny_llm, tmp_path):
    arguments = (
        f"--run={tmp_path / 'run'}",
        f"--model={tiny_llm}",
        "--tasks=longbench_qasper",
    )
    code, _, err = run("longbench", *arguments)
    assert code == 2
    assert "run the task once with network access" in err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("ruler", "pip install 'lm_eval[ruler]>=0.4.13'."),
        ("longbench", "pip install 'lm_eval[longbench]>=0.4.13'."),
        ("videomme", "pip install 'lmms-eval>=0.7.3'."),
    ],
)
def test_a_missing_harness_says_what_to_install(name, remedy, monkeypatch, tmp_path):
    monkeypatch.setattr("eval_language.harness_run.find_spec", lambda module: None)
    code, _, err = run(name, f"--run={tmp_path / 'run'}", "--model=any")
    assert code == 2
    assert err.count("\n") == 1
    assert remedy in err
    assert not (tmp_path / "run").exists()


def test_videomme_runs_the_text_model_sparse_and_its_first_layers_dense(harnesses, tmp_path):
    """Plumbing: random weights and a clip of noise."""
    arguments = ["--settings=0.5:16", "--dense-layers=1", "--samples=4", "--tasks=videomme"]
    code, _, err = run("videomme", f"--run={tmp_path / 'run'}", "--model=any", *arguments)
    assert code == 0, err
    (dense, _), (text, vision) = harnesses("lmms_eval.evaluator").IMPLEMENTATIONS
    assert (dense, text.split("-")[0], vision) == ("sdpa", "xattention", "sdpa")
    record = json.loads((tmp_path / "run/report.json").read_text())["results"][1]
    assert record["scores"] == {"0": 0.0, "1": 1.0, "2": 0.0, "3": 1.0}
    assert "dense layer 1" in record["attention"]
    assert "1/2 layers sparse" in record["attention"]


@pytest.mark.parametrize(
    "command", ["run_ruler.sh", "run_ruler.sh --paper", "run_longbench.sh", "run_vllms.sh"]
)
def test_the_scripts_pass_their_options_on(command):
    name, *words = command.split()
    done = subprocess.run(
        ["bash", ROOT / "scripts" / name, *words, "--help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "THRESHOLD:STRIDE" in done.stdout


def test_the_loss_on_text_is_that_of_its_second_half(tiny_llm, tmp_path):
    text = tmp_path / "text"
    text.write_text("".join(f"{number} is a number; " for number in range(300)))
    words = [
        f"--run={tmp_path / 'run'}",
        f"--model={tiny_llm}",
        f"--text={text}",
        "--tokens=512",
    ]
    code, _, err = run("perplexity", *words, "--samples=3", "--settings=0.5:8,0.9999:8")
    assert code == 0, err
    dense, sparse, nearly_all = json.loads((tmp_path / "run/report.json").read_text())["results"]
    tokenizer = AutoTokenizer.from_pretrained(tiny_llm)
    ids = tokenizer(text.read_text(), return_tensors="pt").input_ids[:, 512:1024]
    loaded = AutoModelForCausalLM.from_pretrained(tiny_llm)
    with torch.inference_mode():
        logits = loaded(ids).logits[0, 255:511]
    expected = torch.nn.functional.cross_entropy(logits, ids[0, 256:])
    assert dense["scores"]["1"] == pytest.approx(float(expected), abs=1e-5)
    assert nearly_all["scores"] == pytest.approx(dense["scores"], abs=1e-3)
    assert sparse["density"] < 0.9 < nearly_all["density"]
    assert "lower is better" in (tmp_path / "run/report.md").read_text()


def test_a_text_that_is_too_short(tiny_llm, tmp_path):
    text = tmp_path / "text"
    text.write_text("short")
    words = [f"--run={tmp_path / 'run'}", f"--model={tiny_llm}", f"--text={text}"]
    code, _, err = run("perplexity", *words, "--tokens=2048")
    assert code == 2
    assert "the text has 5 tokens, too few for 100 samples of 2,048; use fewer --samples" in err
    assert not (tmp_path / "run").exists()
    code, _, err = run("perplexity", *words, "--tokens=1")
    assert code == 2
    assert "--tokens must be at least 2, got 1; use 4096." in err


def test_samples_of_text_beyond_the_models_context(tiny_llm, tmp_path):
    words = [f"--run={tmp_path / 'run'}", f"--model={tiny_llm}", "--tokens=2049"]
    code, _, err = run("perplexity", *words)
    assert code == 2
    assert "context is 2,048 tokens, got 2,049; use --tokens 2048 or fewer." in err
    assert err.count("\n") == 1
    assert not (tmp_path / "run").exists()
