"""The attention benchmark: what it records, and that nothing wrong is ever timed."""

import dataclasses
import json
import sys

import pytest
import torch

import benchmarks.problems
from benchmarks import attention, upstream
from xattn_video.backends import torch_gather
from xattn_video.measure import attention_cases, operator_checks
from xattn_video.measure.attention_cases import Case, SparseGrid, measure_cases, sparse_cases
from xattn_video.measure.attention_problems import (
    AttentionProblem,
    AttentionTensors,
    clustered_tensors,
    density_of,
    threshold_for_density,
)
from xattn_video.measure.timing import Budget, time_limit
from xattn_video.ops.attention import block_sparse_attention
from xattn_video.ops.blocks import select_block_lists
from xattn_video.ops.scoring import block_scores
from xattn_video.ops.selection import select_blocks

CPU = torch.device("cpu")
TINY = AttentionProblem("tiny", length=900, heads=2, head_dim=16)
CAUSAL = AttentionProblem("causal", 900, heads=4, head_dim=16, key_heads=2, causal=True)
QUICK = Budget(repeats=2, max_seconds=5)
NAMES = {"dense", "scoring", "selection", "attention", "xattention"}
COLUMNS = {"name", "backend", "n", "heads", "head_dim", "dtype", "latency_ms", "peak_memory_gib"}


@pytest.fixture
def tensors():
    return clustered_tensors(TINY, CPU, torch.float32)


@pytest.fixture
def run_benchmark(monkeypatch, tmp_path):
    """Run the command on a tiny problem; what it writes."""
    monkeypatch.setitem(benchmarks.problems.PROBLEMS, "tiny", TINY)

    def run(*words):
        output = tmp_path / "results.json"
        options = ["--problem", "tiny", "--device", "cpu", "--repeats", "2", "--output", output]
        if "--backends" not in words:
            options += ["--backends", "torch_gather"]
        attention.main([str(word) for word in [*options, *words]])
        return json.loads(output.read_text())

    return run


def test_every_part_has_a_row(run_benchmark):
    found = run_benchmark("--density", "0.3,0.6", "--stride", "8,16")
    assert found["failures"] == []
    assert {row["name"] for row in found["rows"]} == NAMES
    for row in found["rows"]:
        assert row.keys() >= COLUMNS
        assert row["latency_ms"] > 0
    kinds = [(row["name"], row.get("stride")) for row in found["rows"]]
    assert kinds.count(("dense", None)) == 2
    assert kinds.count(("attention", 8)) == 2
    assert kinds.count(("attention", 16)) == 0
    assert kinds.count(("xattention", 16)) == 2


def test_the_file_says_where_it_comes_from(run_benchmark):
    found = run_benchmark("--dense", "sdpa", "--threshold", "0.5", "--commit", "abc123")
    assert found["commit"] == "abc123"
    assert found["gpu"] is None
    assert found["versions"]["torch"] == torch.__version__


def test_only_the_dense_kernels_asked_for_run(run_benchmark):
    found = run_benchmark("--dense", "none")
    assert not [row for row in found["rows"] if row["name"] == "dense"]


def test_further_runs_share_the_file(run_benchmark):
    found = run_benchmark("--dense", "none", "--density", "0.3", "--then", "--stride", "16")
    strides = [row["stride"] for row in found["rows"] if row["name"] == "scoring"]
    assert strides == [8, 16]
    assert not [row for row in found["rows"] if row["name"] == "dense"]


def test_scores_of_8_bits_are_asked_for(run_benchmark, monkeypatch):
    asked = []

    def scores(*tensors, precision, **options):
        asked.append(precision)
        if precision == "float8":
            raise ValueError("no 8 bits here")
        return block_scores(*tensors, **options)

    monkeypatch.setattr(attention_cases, "block_scores", scores)
    precisions = ["--precision", "exact,float8", "--stride", "8,16"]
    found = run_benchmark(*precisions, "--density", "0.4", "--dense", "none")
    assert set(asked) == {"exact", "float8"}
    failures = [(row["name"], row["stride"], row["precision"]) for row in found["failures"]]
    assert failures == [("scoring", 8, "float8"), ("scoring", 16, "float8")]
    kinds = {(row["name"], row["stride"]) for row in found["rows"]}
    assert kinds >= {("xattention", 8), ("xattention", 16)}


def test_a_density_is_met_by_real_selection(tensors):
    scores = block_scores(tensors.query, tensors.key)
    forced = tensors.forced_blocks()
    tau = threshold_for_density(scores, 0.5, forced)
    blocks = select_block_lists(scores, tau, forced)
    assert density_of(blocks, forced) == pytest.approx(0.5, abs=0.07)
    assert density_of(blocks, forced) == blocks.to_mask().double().mean().item()


def test_the_density_of_causal_attention_is_that_of_the_triangle():
    tensors = clustered_tensors(CAUSAL, CPU, torch.float32)
    assert tensors.key.shape == (1, 2, 900, 16)
    scores = block_scores(tensors.query, tensors.key, causal=True)
    forced = tensors.forced_blocks()
    every = select_block_lists(scores, 1.0, forced)
    assert every.counts.sum() == 4 * 8 * 9 / 2
    assert density_of(every, forced) == 1
    tau = threshold_for_density(scores, 0.6, forced)
    assert density_of(select_block_lists(scores, tau, forced), forced) == pytest.approx(
        0.6, abs=0.05
    )


def test_causal_attention_is_measured(run_benchmark, monkeypatch):
    monkeypatch.setitem(benchmarks.problems.PROBLEMS, "tiny", CAUSAL)
    found = run_benchmark("--density", "0.6", "--stride", "16")
    assert found["failures"] == []
    assert {row["name"] for row in found["rows"]} == NAMES
    assert [row["backend"] for row in found["rows"] if row["name"] == "dense"] == ["sdpa"]
    assert all(row["causal"] and row["key_heads"] == 2 for row in found["rows"])
    assert all(row["error"] < 1e-5 for row in found["rows"])


def test_attention_that_is_not_causal_is_found(run_benchmark, monkeypatch):
    monkeypatch.setitem(benchmarks.problems.PROBLEMS, "tiny", CAUSAL)
    right = torch_gather.forward
    monkeypatch.setattr(
        torch_gather,
        "forward",
        lambda inputs, return_lse: right(dataclasses.replace(inputs, causal=False), return_lse),
    )
    found = run_benchmark("--density", "0.6", "--dense", "none")
    assert {row["name"] for row in found["failures"]} == {"attention", "xattention"}


def test_a_backend_that_refuses_is_a_failure(run_benchmark):
    found = run_benchmark("--backends", "flash4,torch_gather", "--density", "0.5")
    assert {row["backend"] for row in found["failures"]} == {"flash4"}
    assert all("BackendUnavailableError" in row["failure"] for row in found["failures"])
    assert [row["name"] for row in found["rows"] if row["backend"] == "torch_gather"] == [
        "attention",
        "xattention",
    ]


def test_a_backend_that_ignores_the_mask_is_not_timed(run_benchmark, monkeypatch, capsys):
    def dense(inputs, return_lse):
        out = torch.nn.functional.scaled_dot_product_attention(
            inputs.query, inputs.key, inputs.value
        )
        return out, None

    monkeypatch.setattr(torch_gather, "forward", dense)
    found = run_benchmark("--density", "0.4")
    assert {row["name"] for row in found["failures"]} == {"attention", "xattention"}
    assert "attention differ from the formula" in found["failures"][0]["failure"]
    assert "failed: WrongResultError" in capsys.readouterr().out


def test_wrong_scores_are_found(tensors):
    scores = block_scores(tensors.query, tensors.key, stride=16)
    assert operator_checks.check_scores(scores, tensors, 16) < 1e-5
    with pytest.raises(operator_checks.WrongResultError, match="scores differ from the formula"):
        operator_checks.check_scores(scores, tensors, 8)


def test_wrong_selections_are_found(tensors):
    scores = block_scores(tensors.query, tensors.key)
    mask = select_blocks(scores, 0.8)
    assert operator_checks.check_selection(mask, scores, 0.8, None) < 1e-5
    for wrong in (torch.ones_like(mask), select_blocks(scores, 0.4)):
        with pytest.raises(operator_checks.WrongResultError, match="selection differ"):
            operator_checks.check_selection(wrong, scores, 0.8, None)


def test_text_is_forced_into_the_selection():
    tensors = AttentionTensors("text", *torch.randn(3, 1, 2, 900, 16), num_text_tokens=30)
    forced = tensors.forced_blocks().to_mask(tensors.query.device)
    scores = block_scores(tensors.query, tensors.key)
    mask = select_blocks(scores, 0.2, forced=forced)
    assert operator_checks.check_selection(mask, scores, 0.2, forced) < 1e-5
    found = [row for row, _ in measure_cases(_sparse(tensors), CPU, QUICK)]
    assert {row["density"] for row in found if "density" in row} == {mask.double().mean().item()}
    assert not any("failure" in row for row in found)


def _sparse(tensors):
    return sparse_cases(tensors, SparseGrid(thresholds=(0.2,), backends=("torch_gather",)))


def test_wrong_attention_is_found(tensors):
    mask = torch.ones(1, 1, 8, 8, dtype=torch.bool)
    out = block_sparse_attention(tensors.query, tensors.key, tensors.value, mask)
    assert operator_checks.check_attention(out, tensors) < 1e-5
    out[:, -1, -1] = torch.nan
    with pytest.raises(operator_checks.WrongResultError, match="nan"):
        operator_checks.check_attention(out, tensors)


def test_a_case_that_is_slow_or_breaks_leaves_the_others(monkeypatch):
    def broken():
        raise KeyError("inside")

    def slow():
        while True:
            pass

    monkeypatch.setattr("xattn_video.measure.attention_cases._SECONDS_TO_COMPILE", 0.1)
    cases = [Case({"number": n}, run, float) for n, run in enumerate([broken, slow, lambda: 0.0])]
    found = list(measure_cases(iter(cases), CPU, Budget(repeats=1, max_seconds=0.1)))
    assert [done for _, done in found] == [False, False, True]
    assert found[0][0] == {"number": 0, "failure": "KeyError: 'inside'"}
    assert "stopped after 0.2 seconds" in found[1][0]["failure"]


def test_what_breaks_between_cases_is_a_failure():
    def cases():
        yield Case({}, lambda: 0.0, float)
        raise MemoryError("no inputs")

    found = list(measure_cases(cases(), CPU, QUICK))
    assert [done for _, done in found] == [True, False]
    assert found[1][0] == {"failure": "MemoryError: no inputs"}


def test_time_limits_end():
    with time_limit(0.05):
        pass
    torch.randn(1000).sort()


def test_the_budget_bounds_the_repeats():
    budget = Budget(repeats=10, max_seconds=3)
    assert [budget.repeats_of(seconds) for seconds in (0.001, 1.0, 60.0)] == [10, 3, 1]


def test_groups_are_taken_apart():
    names = [problem.name for problem in benchmarks.problems.find_problems(["cpu-8k", "sweep"])]
    assert names == ["cpu-8k", "8k", "16k", "32k", "64k", "128k", "256k"]
    lengths = [problem.length for problem in benchmarks.problems.find_problems(["cpu-sweep"])]
    assert lengths == [2048, 4096, 8192, 16384]
    llama = benchmarks.problems.find_problems(["llama-8b"])
    assert [problem.length for problem in llama] == [2**k for k in range(13, 19)]
    assert {(problem.heads, problem.key_heads, problem.causal) for problem in llama} == {
        (32, 8, True)
    }


def test_unknown_problems_are_refused(capsys):
    with pytest.raises(SystemExit):
        attention.main(["--problem", "hunyuan"])
    assert (
        "unknown problem 'hunyuan'; expected some of hunyuan-720p-129f" in capsys.readouterr().err
    )


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A folder laid out as the authors' code, with an estimate that keeps every block."""
    source = tmp_path / "checkout" / "xattn" / "src"
    source.mkdir(parents=True)
    (source / "Xattention.py").write_text(
        """
import torch
from block_sparse_attn import block_sparse_attn_func

def xattn_estimate(query, key, block_size, stride, threshold, causal, chunk_size):
    blocks = -(-key.shape[2] // chunk_size) * chunk_size // block_size
    mask = torch.ones(*query.shape[:2], blocks, blocks, dtype=torch.bool)
    return mask.float(), mask

def Xattention_prefill(query, key, value, stride, threshold, causal):
    return block_sparse_attn_func(query, key, value)
"""
    )
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield source.parents[1]
    for name in [name for name in sys.modules if name.split(".")[0] == "xattn"]:
        del sys.modules[name]


def test_a_checkout_of_the_authors_code_is_timed(run_benchmark, checkout):
    found = run_benchmark("--upstream", checkout)
    rows = [row for row in found["rows"] if row["backend"] == "x-attention"]
    assert [row["name"] for row in rows] == ["scoring"] * 3
    assert rows[0]["includes"] == "selection"
    assert "block_sparse_attn" not in sys.modules


def test_the_authors_attention_is_timed_where_its_kernel_is(run_benchmark, checkout):
    package = checkout / "block_sparse_attn"
    package.mkdir()
    (package / "__init__.py").write_text(
        "from torch.nn.functional import scaled_dot_product_attention as block_sparse_attn_func"
    )
    found = run_benchmark("--upstream", checkout, "--density", "0.5")
    del sys.modules["block_sparse_attn"]
    (row,) = [
        row
        for row in found["rows"]
        if row["backend"] == "x-attention" and row["name"] == "xattention"
    ]
    assert row["density"] == 1
    assert row["error"] < 1e-5


def test_folders_without_the_authors_code_add_no_row(tmp_path):
    assert not upstream.find_checkouts([tmp_path])
    with pytest.raises(FileNotFoundError, match="is not a folder"):
        upstream.find_checkouts([tmp_path / "missing"])
    sys.path.remove(str(tmp_path))


def test_the_chunk_is_the_one_the_authors_take():
    assert [upstream.default_chunk_size(n) for n in (1000, 30_000, 119_056)] == [2048, 8192, 2048]
