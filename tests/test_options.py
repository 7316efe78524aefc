"""Options are made from the fields of dataclasses: a new field is a new option everywhere."""

import json
import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
from command_line import SMALL, SPARSE, run_cli
from typer.testing import CliRunner

from xattn_video.cli import app
from xattn_video.pipelines.job_ranks import JobRanks
from xattn_video.reporting.console import TYPED_OPTIONS, as_typed

TESTS = Path(__file__).parent
# A process of its own in which `SparseSettings` has one more field, put there before anything else
# reads it; its arguments are those of `xattn-video`.
WITH_A_KNOB = """
import sys
from dataclasses import dataclass, field
from xattn_video.policy import settings

Plain = settings.SparseSettings

@dataclass(frozen=True, slots=True)
class SparseSettings(Plain):
    choose_every: int = field(
        default=4, kw_only=True, metadata={"help": "Choose blocks so often."}
    )

    def __post_init__(self):
        Plain.__post_init__(self)
        if self.choose_every < 1:
            raise ValueError(f"choose_every must be at least 1, got {self.choose_every}; use 4.")

settings.SparseSettings = SparseSettings
if sys.argv[1] == "eval_vbench":
    from eval_vbench.generate import app
    app(sys.argv[2:])
from xattn_video.cli import app
app(sys.argv[1:])
"""


def run_with_a_knob(*words: object) -> tuple[int, str, str]:
    done = subprocess.run(
        [sys.executable, "-c", WITH_A_KNOB, *map(str, words)],
        capture_output=True,
        text=True,
        env={**os.environ, "COLUMNS": "120", "PYTHONPATH": str(TESTS.parent)},
    )
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize("command", ["generate", "compare", "plan", "eval_vbench"])
def test_a_new_knob_is_an_option_with_help_default_and_check(command, tmp_path):
    code, out, err = run_with_a_knob(command, "--help")
    assert code == 0, err
    (line,) = [line for line in out.splitlines() if "--choose-every" in line]
    assert "<int>" in line
    assert "Choose blocks so often. [default: 4]" in line
    given = {"plan": [], "eval_vbench": ["--run", tmp_path / "r"]}.get(command, ["--prompt=a"])
    code, out, err = run_with_a_knob(command, *given, "--choose-every=0", "--device=cpu")
    assert (code, err) == (2, "error: --choose-every must be at least 1, got 0; use 4.\n")


def test_a_new_knob_is_in_the_report(tiny_pipeline, tmp_path):
    report = tmp_path / "run.json"
    code, _, err = run_with_a_knob(
        "generate",
        "--prompt=a",
        f"--model={tiny_pipeline}",
        *SMALL,
        *SPARSE,
        "--choose-every=7",
        f"--output={tmp_path / 'a.mp4'}",
        f"--report={report}",
    )
    assert code == 0, err
    (run,) = json.loads(report.read_text())["runs"]
    assert (run["sparse"]["choose_every"], run["sparse"]["threshold"]) == (7, 0.8)


@pytest.mark.parametrize(
    "command",
    ["", "generate", "compare", "calibrate", "plan", "bench", "backends", "prefill"],
)
def test_every_help_has_a_short_name_and_an_example(command):
    code, short, err = run_cli(*command.split(), "-h")
    assert code == 0, err
    assert short == run_cli(*command.split(), "--help")[1]
    assert f"Example: xattn-video {command}".rstrip() in " ".join(short.split())


def test_the_options_of_an_example_exist():
    from xattn_video.cli import EXAMPLES

    for command, example in EXAMPLES.items():
        name, *words = example.split()
        assert name == command.__name__
        shown = run_cli(name, "--help")[1]
        for word in words:
            assert not word.startswith("--") or word in shown


@pytest.mark.parametrize("name", ["generate", "report", "score", "setup_vbench"])
def test_eval_vbench_has_them_too(name):
    module = import_module(f"eval_vbench.{name}")
    result = CliRunner().invoke(module.app, ["-h"])
    assert result.exit_code == 0
    assert f"Example: python -m eval_vbench.{name}" in " ".join(result.stdout.split())
    assert "-q" in result.stdout


def test_every_command_that_prints_a_table_prints_json_too():
    for name in ("compare", "calibrate", "plan", "bench", "backends"):
        assert "--json" in run_cli(name, "-h")[1]
    for name in ("report", "score"):
        app = import_module(f"eval_vbench.{name}").app
        assert "--json" in CliRunner().invoke(app, ["-h"]).stdout
    code, out, err = run_cli("backends", "--json", "--device=cpu")
    found = json.loads(out)
    assert (code, err, found["auto"]) == (0, "", "torch_gather")
    assert found["reasons_against"]["torch_gather"] == []


def test_shells_can_complete_the_commands(monkeypatch):
    monkeypatch.setenv("_XATTN_VIDEO_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", "xattn-video pl")
    monkeypatch.setenv("COMP_CWORD", "1")
    result = CliRunner().invoke(app, [], prog_name="xattn-video")
    assert result.stdout.split() == ["plan"]


def test_quiet_leaves_the_results_and_the_warnings(tiny_pipeline, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = (
        "generate",
        "--prompt=a",
        f"--model={tiny_pipeline}",
        *SMALL,
        "--warmup-steps=9",
        "--min-tokens=0",
    )
    code, out, err = run_cli(*words, "-q")
    assert code == 0, err
    assert out.startswith("video ")
    assert all(line.startswith("warning: ") for line in err.splitlines())
    # Options are named as they are typed in warnings as well.
    assert "No step is sparse: --warmup-steps=9, --cooldown-steps=0 and steps" in err
    code, out, err = run_cli(*words)
    assert "loading " in err


def test_a_message_names_options_as_typed_and_leaves_other_words_alone():
    TYPED_OPTIONS.set({"stride": "--stride", "block_size": "--block-size", "seed": "--seed"})
    text = "stride must divide block_size, got stride=12; a seed in 'a/seed=1' is no strides."
    assert as_typed(text) == (
        "--stride must divide --block-size, got --stride=12; a seed in 'a/seed=1' is no strides."
    )
    TYPED_OPTIONS.set(None)
    assert as_typed(text) == text


def test_the_package_can_be_run():
    done = subprocess.run(
        [sys.executable, "-m", "xattn_video", "--version"],
        capture_output=True,
        text=True,
        cwd=TESTS.parent,
    )
    assert done.stdout.startswith("xattn-video "), done.stderr


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize("words", [["compare", "--prompt=a"], ["plan"], ["backends"]])
def test_several_ranks_are_refused(words, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, words, obj=JobRanks(0, 2))
    assert (result.exit_code, result.stdout) == (2, "")
    assert f"{words[0]} runs as one process, got 2 ranks; start it without" in result.stderr
    assert result.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize("option", ["prompt", "negative-prompt"])
def test_prompts_that_are_not_utf_8_are_refused(option, generate):
    """What Python makes of the byte E9 among a command's words."""
    text = "caf\udce9"
    words = [f"--{option}={text}", "--true-cfg-scale=2"]
    code, out, err = generate(*words, *(["--prompt=a"] if option != "prompt" else []))
    assert (code, out) == (2, "")
    assert f"the {option.replace('-', ' ')} is not UTF-8 text, got 'caf\\udce9'" in err
    assert err.count("\n") == 1


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize("output", ["f/a.mp4", "f/deeper/a.mp4"])
def test_a_file_in_the_place_of_a_folder_is_called_one(output, generate, tmp_path):
    (tmp_path / "f").touch()
    code, _, err = generate("--prompt=a", f"--output={output}")
    assert code == 2
    assert "'f' is a file, not a folder; use another." in err


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize("target", [os.devnull, "missing"])
def test_what_else_is_in_the_place_of_a_folder_is_named(target, generate, tmp_path):
    (tmp_path / "f").symlink_to(target)
    code, _, err = generate("--prompt=a", "--output=f/a.mp4")
    assert code == 2
    assert "'f' is a file, not a folder; use another." in err


@pytest.mark.usefixtures("no_model")
def test_a_backend_that_needs_a_gpu_names_the_option(generate):
    code, _, err = generate("--prompt=a", "--backend=flash4")
    assert code == 2
    assert "use a CUDA GPU, or --backend auto." in err
