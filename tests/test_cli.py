"""The command line as a whole, and its short commands."""

import errno
import io
import json
import logging
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from command_line import SMALL, run_cli

from xattn_video.pipelines.source import HUNYUAN_VIDEO

ROOT = Path(__file__).parents[1]


@pytest.mark.usefixtures("no_triton")
def test_backends_lists_every_backend_with_its_reasons():
    code, out, _ = run_cli("backends", "--device=cpu")
    assert code == 0
    lines = out.splitlines()
    assert "cpu, float32, head size 128, blocks of 128 tokens" in lines[0]
    rows = [line.rstrip().split(maxsplit=2) for line in lines]
    assert ["torch_gather", "yes"] in rows
    assert ["triton", "no", "- no GPU; get one."] in rows
    assert lines[-1] == "auto takes torch_gather."


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--head-dim=0", "--head-dim must be at least 1, got 0"),
        ("--block-size=0", "--block-size must be at least 1 token, got 0"),
        ("--dtype=int4", "--dtype must be one of float32, float16, bfloat16, got 'int4'"),
        ("--device=meta", "--device must be cpu, cuda or cuda:N, got 'meta'"),
        ("--device=cpu:3", "--device must be cpu, cuda or cuda:N, got 'cpu:3'"),
    ],
)
def test_backends_refuses_what_no_problem_has(option, message):
    code, out, err = run_cli("backends", option)
    assert (code, out) == (2, "")
    assert err.startswith(f"error: {message}")
    assert err.count("\n") == 1


@pytest.mark.usefixtures("no_model")
def test_plan_for_a_person_and_for_a_program(tiny_pipeline):
    code, out, err = run_cli("plan", "--model", tiny_pipeline, "--device=cpu")
    assert code == 0, err
    assert "118,800 video (33 x 45 x 80) + up to 256 text" in out
    assert "5 dense, 45 sparse, 3 layers" in out
    assert "density from the paper for HunyuanVideo, not measured here" in out
    code, out, _ = run_cli("plan", "--model", tiny_pipeline, "--device=cpu", "--json", "--dense")
    assert json.loads(out)["sparse_steps"] == 0


def test_plan_tells_the_memory_of_every_way_to_offload():
    """`xattn-video plan` for HunyuanVideo on a GPU elsewhere."""
    lines = run_cli("plan", "--device=cuda")[1].splitlines()
    (offload,) = [line for line in lines if line.startswith("offload ")]
    assert offload.startswith("offload    model, the default; with --gpu-memory, the fastest")
    assert "with none 50.6 GiB (host 39.4), with group 12.7 GiB (host 80.1)" in offload
    lines = run_cli("plan", "--device=cpu")[1].splitlines()
    assert "offload    none" in lines


def test_plan_warns_where_sparse_attention_would_not_pay(tiny_pipeline):
    code, _, err = run_cli("plan", "--model", tiny_pipeline, *SMALL)
    assert code == 0
    assert err.startswith("warning: No step is sparse: 48 video tokens")


def test_help_needs_no_heavy_import():
    code = """
import sys
for name in ("torch", "diffusers", "transformers", "numpy", "imageio", "matplotlib"):
    sys.modules[name] = None
from typer.testing import CliRunner
from xattn_video.cli import app
for command in ([], ["generate"], ["compare"], ["plan"], ["bench"], ["backends"]):
    result = CliRunner().invoke(app, [*command, "--help"])
    assert result.exit_code == 0, result.output
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_the_version():
    from xattn_video import __version__

    assert run_cli("--version")[1] == f"xattn-video {__version__}\n"


def test_the_hubs_retries_are_not_shown():
    """A fresh process: the hub's library sets the level of its logger when it is imported."""
    code = """
import logging
from xattn_video.reporting.console import log_choices
log_choices(verbose=False)
import huggingface_hub
logging.getLogger("huggingface_hub.utils._http").warning("Retrying in 1s")
"""
    done = subprocess.run(
        [sys.executable, "-c", code], check=True, cwd=ROOT, capture_output=True, text=True
    )
    assert done.stderr == ""


def test_verbose_ends_with_its_command(generate):
    logger = logging.getLogger("xattn_video")
    for words, expected in ((["--verbose"], True), ([], False)):
        code, _, err = generate("--prompt=a", "--dense", "--output=a.mp4", "--overwrite", *words)
        assert code == 0, err
        assert logger.isEnabledFor(logging.INFO) == expected


def test_help_names_the_default_model_whole():
    assert HUNYUAN_VIDEO == "hunyuanvideo-community/HunyuanVideo"
    for command in ("generate", "compare", "plan", "bench"):
        code, out, _ = run_cli(command, "--help")
        assert code == 0
        words = " ".join(out.replace("│", " ").split())
        assert "[default: (HunyuanVideo, from the hub" in words


UNBUFFERED = pytest.mark.parametrize("unbuffered", ["", "1"], ids=["buffered", "unbuffered"])


def run_printing_to(target, *words, unbuffered, limit=""):
    """Exit code and stderr of a command whose stdout is a file."""
    command = shlex.join([sys.executable, "-m", "xattn_video", *words])
    return subprocess.run(
        ["bash", "-c", f"{limit}{command} > {target}"],
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=os.environ | {"PYTHONUNBUFFERED": unbuffered},
    )


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux")
@UNBUFFERED
def test_results_that_a_full_disk_cuts_short_are_no_success(unbuffered, tmp_path):
    words = ["plan", "--model=demo", "--json"]
    file = tmp_path / "plan.json"
    # Room for a part of it.
    cut = run_printing_to(file, *words, unbuffered=unbuffered, limit="ulimit -f 1; ")
    assert file.stat().st_size == 1024
    for run in (cut, run_printing_to("/dev/full", "plan", "-h", unbuffered=unbuffered)):
        assert run.returncode == 1
        assert len(run.stderr.splitlines()) == 1, run.stderr
        assert run.stderr.startswith("error: ")


@UNBUFFERED
def test_closed_streams_do_not_fail_a_command(unbuffered):
    run = run_printing_to("/dev/null >&-", "plan", "--model=demo", unbuffered=unbuffered)
    assert (run.returncode, run.stderr) == (0, "")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (BrokenPipeError(errno.EPIPE, "Broken pipe"), "the run ended early because the reader"),
        (OSError(errno.ENOSPC, "No space left on device"), "not all results could be printed: No"),
    ],
)
def test_a_run_that_cannot_print_says_so(error, message, monkeypatch, capsys):
    from xattn_video.reporting.endings import ErrorsToExitCodes

    class Unwritable(io.StringIO):
        def flush(self):
            raise error

    monkeypatch.setattr(sys, "stdout", Unwritable())
    errors = ErrorsToExitCodes(verbose=False)
    errors.running = True
    with pytest.raises(typer.Exit) as ended, errors:
        raise error
    assert ended.value.exit_code == 1
    assert capsys.readouterr().err.startswith(f"error: {message}")


@UNBUFFERED
def test_a_reader_that_has_read_enough_is_told_nothing(unbuffered, tmp_path):
    run = run_printing_to(">(true)", "plan", "--model=demo", "--json", unbuffered=unbuffered)
    assert run.stderr == ""
