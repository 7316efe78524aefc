"""`xattn-video bench`: what it measures and what it concludes."""

import json

import pytest
from command_line import run_cli

from xattn_video.cli.bench import _warn_of_waiting, print_speedup
from xattn_video.measure.dense_baselines import STOCK
from xattn_video.measure.speedup import Speedup
from xattn_video.pipelines.loading import LoadOptions
from xattn_video.pipelines.model_shape import ModelShape
from xattn_video.pipelines.request import VideoSettings
from xattn_video.pipelines.run_plan import plan_run
from xattn_video.policy.settings import SparseSettings
from xattn_video.reporting.console import output_console

SMALL = "--height=128 --width=128 --num-frames=17 --device=cpu --dtype=float32 --seconds=0.1"


def bench(*options):
    return run_cli("bench", *SMALL.split(), *options)


def row(name, backend, latency_ms, **columns):
    return {"name": name, "backend": backend, "latency_ms": latency_ms, "density": 1.0, **columns}


MEASURED = Speedup(
    rows=(
        row("dense", "flash-attn-4", 250.0, tflops=690.0),
        row("dense", STOCK, 450.0),
        row("attention", "flash4", 100.0),
        row("xattention", "flash4", 125.0),
    ),
    failures=({"name": "dense", "backend": "cudnn", "failure": "RuntimeError: no\nkernel"},),
)


def test_all_parts_are_shown():
    code, shown, progress = bench("--density=0.5")
    assert code == 0
    assert shown.startswith("576 tokens on cpu, float32")
    parts = [line.split()[0] for line in shown.splitlines()[3:9]]
    assert parts == ["dense", "dense", "scoring", "selection", "attention", "total"]
    assert "the best dense kernel" in shown
    assert "steps, 5 of them dense" in shown
    assert "scoring: " in progress


def test_what_fails_while_measuring_is_no_bad_argument(monkeypatch):
    from xattn_video.measure import speedup

    def fail(*given):
        given[-1](row("dense", "sdpa", 1.0))
        raise ValueError("no such kernel")

    monkeypatch.setattr(speedup, "measure_speedup", fail)
    code, _, err = bench()
    assert code == 1
    assert err.splitlines()[-1] == "error: no such kernel"


def test_json_holds_the_rows_and_the_conclusions():
    code, shown, _ = bench("--json", "--stride=16")
    assert code == 0
    found = json.loads(shown)
    assert found["failures"] == []
    assert {row["stride"] for row in found["rows"] if "stride" in row} == {16}
    slow, fast = found["attention_speedup"], found["step_speedup"]
    # A step changes less than its attention, and in the same direction.
    assert abs(1 - fast) <= abs(1 - slow) + 1e-9


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--density=0", "density must lie in (0, 1], got 0.0"),
        ("--backend=none", "unknown attention backend 'none'"),
        ("--seconds=0", "the seconds for a row must be above 0, got 0.0"),
        ("--stride=12", "--stride must divide block_size, got --stride=12"),
    ],
)
def test_bad_arguments_are_refused(option, message):
    code, _, errors = bench(option)
    assert code == 2
    assert message in errors


def test_a_backend_that_cannot_run_tells_why():
    code, _, errors = bench("--backend=flash4")
    assert code == 2
    assert "flash-attn-4 is not installed" in errors


def test_long_waits_are_announced_on_a_cpu(capsys):
    _warn_of_waiting(60.0, "cuda")
    _warn_of_waiting(0.1, "cpu")
    assert capsys.readouterr().err == ""
    _warn_of_waiting(60.0, "cpu")
    assert "about 100 minutes on a CPU" in capsys.readouterr().err


def test_speed_ups_follow_from_the_rows():
    assert MEASURED.of_attention(MEASURED.best_dense) == 2
    assert MEASURED.of_attention(MEASURED.stock) == 3.6
    assert MEASURED.of_step(0.8) == pytest.approx(1 / 0.6)


def test_conclusions_name_their_baseline(capsys):
    load = LoadOptions(device="cpu")
    plan = plan_run(ModelShape(), VideoSettings(), SparseSettings(), load)
    print_speedup(MEASURED, plan, output_console())
    shown = capsys.readouterr()
    assert "2.00x as fast as flash-attn-4, the best dense kernel; 3.60x as fast as" in shown.out
    assert "attention is 87% of a dense step's" in shown.out
    assert "dense cudnn: RuntimeError: no kernel" in shown.err


def test_a_loss_is_called_one(capsys):
    load = LoadOptions(device="cpu")
    plan = plan_run(ModelShape(), VideoSettings(), SparseSettings(), load)
    slower = Speedup((row("dense", "sdpa", 1.0), row("xattention", "triton", 2.0)), ())
    print_speedup(slower, plan, output_console())
    assert "is slower here" in capsys.readouterr().err


def test_nothing_is_concluded_from_failures(capsys):
    load = LoadOptions(device="cpu")
    plan = plan_run(ModelShape(), VideoSettings(), SparseSettings(), load)
    print_speedup(Speedup((row("dense", "sdpa", 1.0),), ()), plan, output_console())
    assert "as fast as" not in capsys.readouterr().out
