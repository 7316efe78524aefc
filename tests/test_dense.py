"""Which dense kernel runs where nobody chose one."""

import importlib.metadata

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.attention_dispatch import AttentionBackendName
from oracle import assert_within_budget, masked_attention

from xattn_video.backends import dense
from xattn_video.backends.dense import attend_with, fastest_dense_kernel
from xattn_video.kernels import flash_attention_4
from xattn_video.processors import engine
from xattn_video.processors.layout import TokenLayout

GPU = torch.device("cuda", 0)


@pytest.fixture
def machine(monkeypatch):
    """Pretend to have a GPU of this capability, with the package or without it."""

    def version(name):
        raise importlib.metadata.PackageNotFoundError(name)

    def pretend(capability, package):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(
            importlib.metadata, "version", (lambda name: "4.0.0") if package else version
        )
        monkeypatch.setattr(flash_attention_4, "find_spec", lambda name: name)

    fastest_dense_kernel.cache_clear()
    yield pretend
    fastest_dense_kernel.cache_clear()


@pytest.mark.parametrize(
    ("capability", "package", "dtype", "head_dim", "expected"),
    [
        ((9, 0), True, torch.bfloat16, 128, "flash4"),
        ((9, 0), False, torch.bfloat16, 128, "cudnn"),
        ((9, 0), True, torch.float16, 80, "cudnn"),
        ((9, 0), True, torch.float32, 128, None),
        ((8, 0), True, torch.bfloat16, 128, None),
        ((10, 0), True, torch.bfloat16, 128, None),
    ],
)
def test_the_kernel_follows_the_gpu(machine, capability, package, dtype, head_dim, expected):
    machine(capability, package)
    assert fastest_dense_kernel(GPU, dtype, head_dim) == expected


def test_the_cpu_is_left_alone(machine):
    machine((9, 0), True)
    assert fastest_dense_kernel(torch.device("cpu"), torch.bfloat16, 128) is None


def attend(lengths, backend=None):
    query, key, value = torch.randn(3, 2, 40, 2, 16)
    # No video here, so that a length is the text's.
    layout = TokenLayout(0, 40, tuple(lengths), query.device)
    found = engine.dense_attention(query, key, value, layout, backend)
    for item, length in enumerate(lengths):
        expected = F.scaled_dot_product_attention(
            query[item].transpose(0, 1),
            key[item, :length].transpose(0, 1),
            value[item, :length].transpose(0, 1),
        )
        torch.testing.assert_close(found[item], expected.transpose(0, 1))


@pytest.mark.parametrize("lengths", [[40, 40], [33, 33], [40, 7]])
@pytest.mark.parametrize("kernel", ["flash4", "cudnn"])
def test_the_keys_are_cut_for_the_kernel(monkeypatch, lengths, kernel):
    """On the CPU, with PyTorch's own attention in flash-attn-4's place."""

    def dense_forward(*tensors):
        tensors = (tensor.transpose(1, 2) for tensor in tensors)
        return F.scaled_dot_product_attention(*tensors).transpose(1, 2)

    used = []
    monkeypatch.setattr(flash_attention_4, "dense_forward", dense_forward)
    monkeypatch.setattr(engine, "fastest_dense_kernel", lambda *_: kernel)
    monkeypatch.setattr(
        engine, "attend_with", lambda name, *t: used.append(name) or attend_with(name, *t)
    )
    attend(lengths)
    assert used == [kernel] * len(set(lengths))


def test_a_backend_that_was_chosen_is_kept(monkeypatch):
    monkeypatch.setattr(engine, "fastest_dense_kernel", lambda *_: "flash4")
    attend([40, 40], "_native_math")
    registry = engine._AttentionBackendRegistry
    monkeypatch.setattr(registry, "_active_backend", AttentionBackendName._NATIVE_MATH)
    attend([40, 40])


def test_a_restriction_of_pytorch_is_kept(monkeypatch):
    monkeypatch.setattr(engine, "fastest_dense_kernel", lambda *_: "flash4")
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        attend([40, 40])


def test_the_choice_leaves_pytorch_as_it_was():
    order = torch._C._get_sdp_priority_order()
    attend_with("cudnn", *torch.randn(3, 1, 8, 1, 16))
    assert torch._C._get_sdp_priority_order() == order


@pytest.mark.gpu
@pytest.mark.parametrize("kernel", ["flash4", "cudnn"])
@pytest.mark.parametrize(("Sq", "Sk"), [(512, 512), (997, 941)])
def test_the_kernel_agrees_with_the_formula(kernel, Sq, Sk, device):
    reasons = flash_attention_4.unsupported_reasons(device, torch.bfloat16, 128)
    if kernel == "flash4" and reasons:
        pytest.skip("; ".join(reasons))
    query, key, value = torch.randn(3, 1, Sq, 2, 128, dtype=torch.bfloat16, device=device)
    key, value = key[:, :Sk], value[:, :Sk]
    actual = dense.attend_with(kernel, query, key, value).transpose(1, 2)
    tensors = [tensor.transpose(1, 2) for tensor in (query, key, value)]
    mask = torch.ones(1, 2, -(-Sq // 128), -(-Sk // 128), dtype=torch.bool)
    expected = masked_attention(*tensors, mask)
    assert_within_budget(actual, expected, masked_attention(*tensors, mask, dtype=torch.bfloat16))
