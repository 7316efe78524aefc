"""The flash4 backend: its reasons and its check on the CPU, its kernel on Hopper."""

import contextlib
import dataclasses
import importlib.metadata
import subprocess
import sys
import types

import pytest
import torch
from oracle import assert_within_budget, masked_attention, masked_log_sum_exp

from xattn_video import BackendUnavailableError, block_sparse_attention
from xattn_video.backends import flash4
from xattn_video.backends.table import AUTO_ORDER, resolve_backend
from xattn_video.kernels import flash_attention_4
from xattn_video.ops.blocks import BlockLists
from xattn_video.ops.problem import AttentionInputs, Problem

CPU = torch.device("cpu")
HOPPER = Problem(
    device=torch.device("cuda", 0), dtype=torch.bfloat16, head_dim=128, block_size=128
)


@pytest.fixture
def capability(monkeypatch):
    """Pretend to be a machine that has the package and a GPU; call it to choose which GPU."""

    def pretend(major, minor):
        monkeypatch.setattr(importlib.metadata, "version", lambda name: "4.0.0")
        monkeypatch.setattr(flash_attention_4, "find_spec", lambda name: name)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (major, minor))

    return pretend


@pytest.fixture
def fresh_check():
    flash4._check_kernel.cache_clear()
    yield
    flash4._check_kernel.cache_clear()


def fake_kernel(monkeypatch, obey=True):
    """Put the formula in the kernel's place; without `obey` it ignores the lists."""
    calls = []

    def attend(query, key, value, counts, indices, *, block_size, causal, scale):
        calls.append(counts.shape)
        mask = torch.ones(indices.shape, dtype=torch.bool)
        if obey:
            kept = torch.arange(indices.shape[-1]) < counts[..., None]
            mask = torch.zeros_like(mask).scatter(-1, indices.long(), kept)
        options = {"block_size": block_size, "causal": causal, "scale": scale}
        out = masked_attention(query, key, value, mask, **options)
        return out.to(query.dtype), masked_log_sum_exp(query, key, mask, **options).float()

    monkeypatch.setattr(flash_attention_4, "block_sparse_forward", attend)
    return calls


def small_inputs():
    query, key, value = torch.randn(3, 1, 1, 257, 64, dtype=torch.bfloat16)
    mask = torch.tensor([[1, 0, 1], [0, 1, 0], [0, 0, 0]]).bool()[None, None]
    return AttentionInputs(query, key, value, BlockLists.from_mask(mask), 128, False, None, 0.125)


def test_hopper_is_supported(capability):
    capability(9, 0)
    assert flash4.unsupported_reasons(HOPPER) == []


def test_auto_takes_it_first_on_hopper(capability):
    capability(9, 0)
    assert AUTO_ORDER["cuda"][0] == "flash4"
    assert resolve_backend("flash4", HOPPER) == "flash4"


def test_it_takes_causal_attention_too(capability):
    """Else a prefill on Hopper would run on a slower kernel."""
    capability(9, 0)
    causal = dataclasses.replace(HOPPER, causal=True)
    assert flash4.unsupported_reasons(causal) == []
    assert resolve_backend("auto", causal) == "flash4"


@pytest.mark.parametrize("found", [(8, 0), (8, 9), (10, 0), (12, 0)])
def test_other_gpus_are_refused(capability, found):
    """On 8.x the package would compute dense attention without a word."""
    capability(*found)
    (reason,) = flash4.unsupported_reasons(HOPPER)
    assert reason == (
        f"compute capability must be 9.x (Hopper), cuda:0 has {found[0]}.{found[1]}; "
        "use backend triton."
    )


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        ({"dtype": torch.float32}, "dtype must be float16 or bfloat16, got torch.float32; "),
        ({"head_dim": 256}, "head_dim must be 64 or 128, got 256; "),
        ({"block_size": 64}, "block_size must be 128, got 64; "),
        ({"ragged": True}, "key lengths per item of the batch are not supported; "),
        ({"device": CPU}, "the device must be CUDA, got cpu; "),
    ],
)
def test_what_it_cannot_run_is_refused(capability, found, expected):
    capability(9, 0)
    (reason,) = flash4.unsupported_reasons(dataclasses.replace(HOPPER, **found))
    assert reason.startswith(expected)


def test_a_gpu_that_is_missing_is_refused(capability, monkeypatch):
    capability(9, 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (reason,) = flash4.unsupported_reasons(HOPPER)
    assert reason.startswith("no CUDA device is present for cuda:0; ")


def test_the_package_that_is_missing_is_named():
    program = """
import importlib.metadata, sys
def absent(name):
    raise importlib.metadata.PackageNotFoundError(name)
importlib.metadata.version = absent
sys.modules["flash_attn"] = None
from xattn_video import available_backends
print(available_backends("cpu", head_dim=64)["flash4"][0])
"""
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    expected = 'flash-attn-4 is not installed; pip install "xattn-video[hopper]".'
    assert run.stdout.strip() == expected


def test_what_an_incomplete_installation_lacks_is_named(monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "4.0.0b36")
    monkeypatch.setattr(
        flash_attention_4, "find_spec", lambda name: None if name == "quack" else name
    )
    reasons = flash4.unsupported_reasons(HOPPER)
    expected = 'flash-attn-4 is installed without quack; pip install "xattn-video[hopper]".'
    assert reasons[0] == expected


def test_the_check_runs_once_for_each_kind_of_input(monkeypatch, fresh_check):
    calls = fake_kernel(monkeypatch)
    inputs = small_inputs()
    first, lse = flash4.forward(inputs)
    assert lse is None
    flash4.forward(inputs)
    assert len(calls) == 3
    options = {"block_size": 128, "scale": 0.125}
    expected = masked_attention(
        inputs.query, inputs.key, inputs.value, inputs.blocks.to_mask(), **options
    )
    torch.testing.assert_close(first, expected.to(first.dtype))
    flash4.forward(dataclasses.replace(inputs, query=inputs.query.half()))
    assert len(calls) == 5


def test_shared_key_heads_have_a_check_of_their_own(monkeypatch, fresh_check):
    calls = fake_kernel(monkeypatch)
    inputs = small_inputs()
    flash4.forward(inputs)
    query = inputs.query.expand(1, 2, -1, -1)
    blocks = BlockLists.from_mask(inputs.blocks.to_mask().expand(1, 2, -1, -1))
    out, _ = flash4.forward(dataclasses.replace(inputs, query=query, blocks=blocks))
    assert out.shape == (1, 2, 257, 64)
    assert len(calls) == 4


def test_causal_attention_has_a_check_of_its_own(monkeypatch, fresh_check):
    calls = fake_kernel(monkeypatch)
    inputs = small_inputs()
    flash4.forward(inputs)
    out, _ = flash4.forward(dataclasses.replace(inputs, causal=True))
    assert calls == [(1, 2, 3), (1, 1, 3), (1, 2, 3), (1, 1, 3)]
    mask = inputs.blocks.to_mask()
    tensors = inputs.query, inputs.key, inputs.value
    expected = masked_attention(*tensors, mask, causal=True, scale=0.125)
    torch.testing.assert_close(out, expected.to(out.dtype))


@pytest.mark.parametrize("causal", [False, True])
def test_a_kernel_that_ignores_the_lists_is_refused(causal, monkeypatch, fresh_check):
    fake_kernel(monkeypatch, obey=False)
    with pytest.raises(BackendUnavailableError, match="ignores the blocks and computes dense"):
        flash4.forward(dataclasses.replace(small_inputs(), causal=causal))


def test_a_kernel_that_is_not_causal_is_refused(monkeypatch, fresh_check):
    fake_kernel(monkeypatch)
    right = flash_attention_4.block_sparse_forward
    monkeypatch.setattr(
        flash_attention_4,
        "block_sparse_forward",
        lambda *args, **options: right(*args, **options | {"causal": False}),
    )
    flash4.forward(small_inputs())
    with pytest.raises(BackendUnavailableError, match=r"is wrong .* in causal attention"):
        flash4.forward(dataclasses.replace(small_inputs(), causal=True))


@pytest.mark.parametrize("change", [lambda lse: lse / 2, torch.zeros_like, lambda lse: lse * 0])
def test_a_wrong_log_sum_exp_is_refused(change, monkeypatch, fresh_check):
    fake_kernel(monkeypatch)
    right = flash_attention_4.block_sparse_forward

    def wrong(*args, **options):
        out, lse = right(*args, **options)
        return out, change(lse)

    monkeypatch.setattr(flash_attention_4, "block_sparse_forward", wrong)
    with pytest.raises(BackendUnavailableError, match="is wrong on cpu"):
        flash4.forward(small_inputs())


@pytest.mark.parametrize("fill", [0.0, float("nan")])
def test_a_kernel_that_is_wrong_is_refused(monkeypatch, fresh_check, fill):
    monkeypatch.setattr(
        flash_attention_4,
        "block_sparse_forward",
        lambda query, *_, **options: (torch.full_like(query, fill), None),
    )
    with pytest.raises(BackendUnavailableError, match="is wrong on cpu with"):
        flash4.forward(small_inputs())


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("D", [64, 128])
@pytest.mark.parametrize(
    ("Sq", "Sk", "causal"),
    [
        (512, 512, False),
        (997, 997, False),
        (129, 641, False),
        (413, 385, False),
        (997, 997, True),
        (129, 641, True),
        (300, 513, True),
        (100, 100, True),
    ],
)
def test_the_kernel_agrees_with_the_formula(Sq, Sk, causal, D, dtype, device):
    problem = Problem(device=device, dtype=dtype, head_dim=D, block_size=128, causal=causal)
    if reasons := flash4.unsupported_reasons(problem):
        pytest.skip("; ".join(reasons))
    # Laid out as Diffusers does, the keys cut from a longer tensor.
    query = torch.randn(2, Sq, 3, D, dtype=dtype, device=device).transpose(1, 2)
    keys = torch.randn(2, 2, Sk + 7, 3, D, dtype=dtype, device=device)[:, :, :Sk]
    key, value = keys.transpose(2, 3)
    mask = torch.rand(2, 3, -(-Sq // 128), -(-Sk // 128), device=device) < 0.5
    mask[0, 0, 0] = False
    mask[1, :, -1] = True
    options = {"block_size": 128, "causal": causal}
    actual = block_sparse_attention(query, key, value, mask, **options, backend="flash4")
    expected = masked_attention(query, key, value, mask, **options)
    same_dtype = masked_attention(query, key, value, mask, **options, dtype=dtype)
    assert actual.transpose(1, 2).is_contiguous()
    assert_within_budget(actual, expected, same_dtype)


@pytest.mark.parametrize("factor", [1.03, 1.3, 0.5])
def test_a_kernel_that_is_a_little_wrong_is_refused(factor, monkeypatch, fresh_check):
    fake_kernel(monkeypatch)
    right = flash_attention_4.block_sparse_forward

    def wrong(*args, **options):
        out, lse = right(*args, **options)
        return out * factor, lse

    monkeypatch.setattr(flash_attention_4, "block_sparse_forward", wrong)
    with pytest.raises(BackendUnavailableError, match=r"is wrong on cpu .*relative error 0\."):
        flash4.forward(small_inputs())


@pytest.mark.parametrize("causal", [False, True])
def test_query_heads_are_never_packed(causal, monkeypatch):
    """Packed, the query heads of a key head would all follow the list of one of them."""
    given = {}

    def flash_attn_func(query, key, value, **options):
        given.update(options)
        return query, torch.zeros(1, 4, 256), None

    interface = types.SimpleNamespace(flash_attn_func=flash_attn_func)
    sparsity = types.SimpleNamespace(BlockSparseTensorsTorch=types.SimpleNamespace)
    for name, module in {
        "flash_attn": types.ModuleType("flash_attn"),
        "flash_attn.cute": types.ModuleType("flash_attn.cute"),
        "flash_attn.cute.interface": interface,
        "flash_attn.cute.block_sparsity": sparsity,
    }.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(torch.cuda, "device", lambda _: contextlib.nullcontext())
    query, key = torch.randn(1, 4, 256, 64), torch.randn(1, 2, 256, 64)
    blocks = BlockLists.from_mask(torch.ones(1, 4, 2, 2, dtype=torch.bool))
    out, lse = flash_attention_4.block_sparse_forward(
        query, key, key, blocks.counts, blocks.indices, block_size=128, causal=causal, scale=0.125
    )
    assert given["causal"] is causal
    assert given["pack_gqa"] is False
    assert given["return_lse"] is True
    assert given["block_sparse_tensors"].full_block_cnt is blocks.counts
    assert out.shape == (1, 4, 256, 64)
    assert lse.shape == (1, 4, 256)
