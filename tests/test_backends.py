import dataclasses
import subprocess
import sys

import pytest
import torch
from oracle import assert_within_budget, masked_attention

from xattn_video import BackendUnavailableError, block_sparse_attention
from xattn_video.backends import flex
from xattn_video.backends.table import load_backend, resolve_backend
from xattn_video.kernels import support
from xattn_video.ops.problem import Problem

BACKENDS = ["flash4", "triton", "flex", "torch_gather"]
CPU = torch.device("cpu")


def make_inputs(B, H, Sq, Sk, D, block_size, device, dtype):
    tensors = [
        torch.randn(B, S, H, D, dtype=dtype, device=device).transpose(1, 2) for S in (Sq, Sk, Sk)
    ]
    shape = (B, H, -(-Sq // block_size), -(-Sk // block_size))
    return *tensors, torch.rand(shape, device=device) < 0.5


def problem(device=CPU, dtype=torch.float32, head_dim=64, block_size=128):
    return Problem(device=device, dtype=dtype, head_dim=head_dim, block_size=block_size)


def require(name, device, dtype, head_dim, block_size, **features):
    """Skip where the backend refuses."""
    asked = dataclasses.replace(problem(device, dtype, head_dim, block_size), **features)
    if reasons := load_backend(name).unsupported_reasons(asked):
        pytest.skip(f"{name}: {'; '.join(reasons)}")


@pytest.mark.parametrize(
    ("B", "H", "Sq", "Sk", "D", "block_size", "causal", "lengths", "dtype"),
    [
        (2, 2, 257, 257, 64, 64, False, [257, 130], torch.float32),
        (1, 1, 129, 397, 128, 128, True, None, torch.float16),
        pytest.param(
            2, 2, 257, 257, 64, 64, False, [257, 130], torch.bfloat16, marks=pytest.mark.gpu
        ),
        pytest.param(1, 1, 129, 397, 128, 128, True, None, torch.bfloat16, marks=pytest.mark.gpu),
        pytest.param(2, 2, 413, 397, 128, 128, False, None, torch.bfloat16, marks=pytest.mark.gpu),
    ],
)
@pytest.mark.parametrize("name", BACKENDS)
def test_backends_agree_with_the_formula(
    name, B, H, Sq, Sk, D, block_size, causal, lengths, dtype, device
):
    require(name, device, dtype, D, block_size, causal=causal, ragged=lengths is not None)
    query, key, value, mask = make_inputs(B, H, Sq, Sk, D, block_size, device, dtype)
    mask[0, 0, 0] = False
    options = {"block_size": block_size, "causal": causal, "key_lengths": lengths}
    actual = block_sparse_attention(query, key, value, mask, **options, backend=name)
    expected = masked_attention(query, key, value, mask, **options)
    same_dtype = masked_attention(query, key, value, mask, **options, dtype=dtype)
    assert actual.dtype == dtype
    assert actual.transpose(1, 2).is_contiguous()
    assert_within_budget(actual, expected, same_dtype)


@pytest.mark.parametrize("name", BACKENDS)
def test_backends_run_inside_a_compiled_graph(name, device):
    """With the shapes of the first case above, so that nothing new compiles for flex."""
    require(name, device, torch.float32, 64, 64)
    query, key, value, mask = make_inputs(2, 2, 257, 257, 64, 64, device, torch.float32)

    def layer(query, key, value, mask):
        return block_sparse_attention(query + 1, key, value, mask, block_size=64, backend=name) * 2

    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(query, key, value, mask), layer(query, key, value, mask))


def test_flex_compiles_once_for_all_masks_and_lengths(device):
    require("flex", device, torch.float32, 64, 64)

    def attend(length):
        query, key, value, mask = make_inputs(2, 2, 257, 257, 64, 64, device, torch.float32)
        return block_sparse_attention(
            query, key, value, mask, block_size=64, key_lengths=[257, length], backend="flex"
        )

    attend(130)
    counters = torch._dynamo.utils.counters["stats"]
    before = counters["unique_graphs"]
    for length in (1, 64, 257):
        attend(length)
    assert counters["unique_graphs"] == before


def test_flex_refuses_to_run_uncompiled(device):
    """Its eager form ignores the block lists, so it would be dense without a word."""
    require("flex", device, torch.float32, 64, 64)
    query, key, value, mask = make_inputs(1, 1, 64, 64, 64, 64, device, torch.float32)
    with (
        torch.compiler.set_stance("force_eager"),
        pytest.raises(RuntimeError, match="ignores the block mask unless it is compiled"),
    ):
        block_sparse_attention(query, key, value, mask, block_size=64, backend="flex")


@pytest.mark.parametrize(
    ("name", "found", "reason"),
    [
        ("triton", {"head_dim": 72}, "head_dim must be a multiple of 16 from 16 to 256, got 72"),
        ("triton", {"head_dim": 512}, "head_dim must be a multiple of 16 from 16 to 256, got 512"),
        ("triton", {"block_size": 96}, "block_size must be 64 or 128, got 96"),
        ("triton", {"dtype": torch.float64}, "dtype must be float32, float16 or bfloat16, got"),
        ("flex", {"block_size": 96}, "block_size must be 64 or 128, got 96"),
        ("flex", {"dtype": torch.float64}, "dtype must be float32, float16 or bfloat16, got"),
        ("flex", {"device": torch.device("meta")}, "the device must be CUDA or the CPU, got meta"),
    ],
)
def test_what_cannot_run_is_refused_with_its_reason(name, found, reason):
    reasons = load_backend(name).unsupported_reasons(problem(**found))
    assert any(given.startswith(reason) for given in reasons), reasons
    # Each names a remedy.
    assert all(";" in given for given in reasons)


def test_triton_refuses_the_cpu_unless_interpreted(monkeypatch):
    backend = load_backend("triton")
    monkeypatch.setattr(support, "INTERPRETING", False)
    (reason,) = backend.unsupported_reasons(problem())
    assert reason.startswith(
        'the device must be CUDA, got cpu; use a CUDA GPU, backend "auto", or set'
    )
    monkeypatch.setattr(support, "INTERPRETING", True)
    assert backend.unsupported_reasons(problem()) == []
    (reason,) = backend.unsupported_reasons(problem(dtype=torch.bfloat16))
    assert reason.startswith("Triton's interpreter computes bfloat16 wrongly")


@pytest.mark.parametrize("name", ["triton", "flex"])
def test_old_gpus_are_refused(name, monkeypatch):
    monkeypatch.setattr(support, "INTERPRETING", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    reasons = load_backend(name).unsupported_reasons(problem(torch.device("cuda", 0)))
    assert any("must be 8.0 or more, cuda:0 has 7.5" in reason for reason in reasons), reasons


@pytest.mark.parametrize("name", ["triton", "flex"])
def test_cuda_without_a_gpu_is_refused(name, monkeypatch):
    monkeypatch.setattr(support, "INTERPRETING", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    reasons = load_backend(name).unsupported_reasons(problem(torch.device("cuda", 0)))
    assert any("no CUDA device is present" in reason for reason in reasons), reasons


@pytest.mark.parametrize("name", ["triton", "flex"])
def test_triton_needs_a_c_compiler(name, monkeypatch):
    monkeypatch.setattr(support, "INTERPRETING", False)
    monkeypatch.setattr(support, "has_c_compiler", lambda: False)
    reasons = load_backend(name).unsupported_reasons(problem(torch.device("cuda", 0)))
    assert "no C compiler was found; install gcc or clang, or set CC to one." in reasons


@pytest.mark.parametrize(
    ("compiler", "named", "found"),
    [(None, None, False), ("gcc", None, True), ("clang", None, True), (None, "tcc", True)],
)
def test_a_c_compiler_is_looked_for_where_triton_does(
    compiler, named, found, monkeypatch, tmp_path
):
    if compiler is not None:
        (tmp_path / compiler).touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    if named is not None:
        monkeypatch.setenv("CC", named)
    support.has_c_compiler.cache_clear()
    try:
        assert support.has_c_compiler() is found
    finally:
        support.has_c_compiler.cache_clear()


def test_flex_on_cuda_needs_a_power_of_two():
    reasons = flex.unsupported_reasons(problem(torch.device("cuda", 0), head_dim=80))
    assert any("head_dim must be a power of two" in reason for reason in reasons), reasons


def test_flex_on_a_cpu_needs_a_compiler(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    reasons = flex.unsupported_reasons(problem())
    assert any("no C++ compiler was found (no-such-compiler)" in given for given in reasons)


def test_flex_on_a_cpu_needs_vector_instructions(monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    reasons = flex.unsupported_reasons(problem())
    assert any("the CPU must have AVX2 or AVX512, got DEFAULT" in given for given in reasons)


def test_flex_needs_torch_compile():
    with torch._dynamo.config.patch(disable=True):
        reasons = flex.unsupported_reasons(problem())
    assert any(given.startswith("torch.compile is disabled") for given in reasons)


def test_reasons_can_be_asked_for_without_triton():
    program = """
import sys
sys.modules["triton"] = None
import torch
from xattn_video import available_backends
for name, reasons in available_backends("cpu").items():
    print(name, reasons)
"""
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert "triton ['triton is not installed; pip install triton (Linux only).'" in run.stdout
    assert "torch_gather []" in run.stdout


def test_auto_tells_every_reason_of_every_backend(monkeypatch):
    for name in ("torch_gather", "flex"):
        reasons = [f"{name} is old.", f"{name} is slow."]
        backend = load_backend(name)
        monkeypatch.setattr(backend, "unsupported_reasons", lambda _, reasons=reasons: reasons)
    with pytest.raises(BackendUnavailableError) as refused:
        resolve_backend("auto", problem())
    assert refused.value.reasons == [
        "torch_gather: torch_gather is old.",
        "torch_gather: torch_gather is slow.",
        "flex: flex is old.",
        "flex: flex is slow.",
    ]
