"""The whole-step benchmark, on a tiny transformer."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hunyuan import TEXT_DIM, tiny_transformer

from benchmarks import step, step_tables, upstream

TESTS = Path(__file__).parent
SMALL = [
    "--height",
    "256",
    "--width",
    "256",
    "--num-frames",
    "17",
    "--device",
    "cpu",
    "--threshold",
    "0.3",
]


@pytest.fixture
def tiny(monkeypatch):
    """A transformer that runs at once, in the benchmark's place for a large one."""
    transformer = tiny_transformer().to(torch.bfloat16)
    monkeypatch.setattr(step, "random_transformer", lambda device, layers: transformer)


def test_steps_of_each_kind_are_recorded(tiny, tmp_path, capsys):
    output = tmp_path / "step.json"
    step.main([*SMALL, "--output", str(output)])
    rows = json.loads(output.read_text())["rows"]
    assert [row["phase"] for row in rows] == ["stock", "dense", "sparse"]
    assert [row["backend"] for row in rows] == ["stock", None, "torch_gather"]
    assert rows[-1]["precision"] == "exact", "what auto is on a CPU"
    for row in rows:
        assert row["name"] == "step"
        assert row["n"] == 5 * 16 * 16 + 256
        assert row["latency_ms"] > 0
        assert row["peak_memory_gib"] is None
    assert 0.2 < rows[-1]["density"] < 0.6
    assert "sparse  torch_gather density" in capsys.readouterr().out


def test_every_kind_of_step_of_a_setting_is_recorded(tiny, tmp_path):
    output = tmp_path / "step.json"
    texts = ["density=0.3,refresh_every=5", "density=0.3,mask_every=4", "density=0.3"]
    settings = [word for text in texts for word in ("--setting", text)]
    step.main([*SMALL, "--skip-stock", "--threshold", "1", *settings, "--output", str(output)])
    rows = [row for row in json.loads(output.read_text())["rows"] if "setting" in row]
    found = [(row["setting"], row["phase"]) for row in rows]
    assert found == [
        *((texts[0], phase) for phase in ("prime", "between", "refresh")),
        *((texts[1], phase) for phase in ("choose", "reuse")),
        (texts[2], "choose"),
    ]
    assert rows[0]["density"] is None
    assert all(row["density"] < 0.5 for row in rows[1:])


def test_the_mean_step_is_that_of_the_whole_generation():
    def row(phase, milliseconds, **more):
        return {"phase": phase, "latency_ms": milliseconds, "peak_memory_gib": 1.0} | more

    refreshing = {"setting": "density=0.1,refresh_every=10"}
    masked = {"setting": "density=0.1,mask_every=4"}
    rows = [row("dense", 100.0), row("prime", 130.0, **refreshing)]
    rows += [row("between", 20.0, **refreshing), row("refresh", 120.0, **refreshing)]
    rows += [row("choose", 30.0, **masked), row("reuse", 20.0, **masked)]
    means = [mean["latency_ms"] for mean in step_tables._mean_steps(rows)]
    # By hand, of 50 steps with a warm-up of 5: the warm-up's last step takes 30 more, 4 refresh,
    # the last one is dense, 40 are between. Of 45, 12 choose.
    assert means == pytest.approx([(30 + 4 * 120 + 100 + 40 * 20) / 45, (12 * 30 + 33 * 20) / 45])


@pytest.mark.slow
def test_a_compiled_transformer_is_recorded_as_such(tiny, tmp_path):
    torch.compiler.reset()
    output = tmp_path / "step.json"
    step.main([*SMALL, "--compile", "--output", str(output)])
    rows = json.loads(output.read_text())["rows"]
    assert [row["phase"] for row in rows] == ["stock", "dense", "sparse"]
    assert all(row["compiled"] for row in rows)
    torch.compiler.reset()


def test_a_step_that_fails_leaves_the_others(tiny, tmp_path, capsys):
    output = tmp_path / "step.json"
    step.main([*SMALL, "--backend", "flash4", "--output", str(output)])
    found = json.loads(output.read_text())
    assert [row["phase"] for row in found["rows"]] == ["stock", "dense"]
    assert "flash-attn-4 is not installed" in found["failures"][0]["failure"]
    assert "sparse failed: attention backend 'flash4'" in capsys.readouterr().out


def test_the_authors_operator_takes_the_layers(tiny, tmp_path, monkeypatch):
    calls = []

    class Authors:
        def Xattention_prefill(self, query, key, value, stride, threshold, causal):  # noqa: N802
            calls.append((query.shape[2], stride, round(threshold, 2), causal))
            return torch.nn.functional.scaled_dot_product_attention(query, key, value)

    monkeypatch.setattr(upstream, "load", Authors)
    monkeypatch.setattr(step, "find_checkouts", lambda folders: True)
    monkeypatch.setattr(step, "has_kernel", lambda: True)
    output = tmp_path / "step.json"
    step.main([*SMALL, "--skip-stock", "--output", str(output)])
    row = json.loads(output.read_text())["rows"][-1]
    assert (row["backend"], row["phase"], row["threshold"]) == ("x-attention", "sparse", 0.3)
    # Video and valid text of every layer, after those of the warm-up's nine frames.
    assert calls[4:] == [(5 * 16 * 16 + 60, 8, 0.3, False)] * 4


def test_upstream_steps_need_the_package(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(step, "find_checkouts", lambda folders: True)
    with pytest.raises(SystemExit):
        step.parse_arguments(["--upstream", str(tmp_path)])
    assert "block_sparse_attn package, which is not installed" in capsys.readouterr().err


def test_the_inputs_fit_the_transformer():
    arguments = step.parse_arguments(["--num-frames", "17", "--height", "64", "--width", "64"])
    config = tiny_transformer().config
    inputs = step.step_inputs(arguments, config, torch.device("cpu"))
    assert inputs["encoder_hidden_states"].shape == (1, 256, TEXT_DIM)
    assert inputs["hidden_states"].shape == (1, 4, 5, 8, 8)
    assert inputs["encoder_attention_mask"].sum() == 60


RANK_OF_TINY_STEPS = """
import sys
from pathlib import Path
import torch
from benchmarks import step
from hunyuan import tiny_transformer

torch.set_num_threads(1)
step.random_transformer = lambda device, layers: tiny_transformer().to(torch.bfloat16)
step.main(sys.argv[1:])
# Python aborts if it ends while threads of gloo run.
assert "gloo" not in " ".join(path.read_text() for path in Path("/proc/self/task").glob("*/comm"))
"""


def test_ranks_are_compared_with_one_of_them(tmp_path):
    script, output = tmp_path / "rank.py", tmp_path / "step.json"
    script.write_text(RANK_OF_TINY_STEPS)
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    run = subprocess.run(
        [sys.executable, *torchrun, script, *SMALL, "--skip-stock", "--output", output],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (TESTS.parent, TESTS)))},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    rows = json.loads(output.read_text())["rows"]
    assert [(row["gpus"], row["phase"]) for row in rows] == [
        (gpus, phase) for gpus in (1, 2) for phase in ("dense", "sparse")
    ]
    assert [row["difference"] for row in rows[2:]] == [0, 0]
    assert all(row["exchange_ms"] > 0 for row in rows[2:])
    assert rows[1]["density"] == rows[3]["density"]
    # The first rank speaks for both.
    assert [line.split()[0] for line in run.stdout.splitlines()] == ["dense", "sparse"] * 2
