"""The block_sparse_attn adapter: its reasons, and what it hands to a stand-in for the package.

The stand-in takes the documented arguments and computes the formula, item by item.
"""

import dataclasses
import importlib.machinery
import sys
from types import ModuleType

import pytest
import torch
from oracle import assert_within_budget, masked_attention

from xattn_video import BackendUnavailableError, block_sparse_attention, xattention
from xattn_video.backends import block_sparse_attn
from xattn_video.backends.table import AUTO_ORDER, resolve_backend
from xattn_video.ops.problem import Problem

GPU = Problem(torch.device("cuda", 0), torch.bfloat16, head_dim=128, block_size=128)


class Package:
    """The package's one function, and the arguments it was called with."""

    def __init__(self):
        self.calls = []
        self.obeys = True

    def block_sparse_attn_func(
        self,
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        head_mask_type,
        streaming_info,
        base_blockmask,
        max_seqlen_q_,
        max_seqlen_k_,
        p_dropout,
        deterministic=False,
        softmax_scale=None,
        is_causal=False,
        exact_streaming=False,
        return_attn_probs=False,
    ):
        self.calls.append(base_blockmask)
        assert all(tensor.is_contiguous() and tensor.dim() == 3 for tensor in (q, k, v))
        assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == head_mask_type.dtype == torch.int32
        assert head_mask_type.tolist() == [1] * q.shape[1]
        assert streaming_info is None
        assert p_dropout == 0
        assert not is_causal
        batch = len(cu_seqlens_q) - 1
        rows, columns = -(-max_seqlen_q_ // 128), -(-max_seqlen_k_ // 128)
        assert base_blockmask.shape == (batch, q.shape[1], rows, columns)
        assert base_blockmask.is_contiguous()
        out = torch.full_like(q, torch.nan)
        for item in range(batch):
            own = slice(*cu_seqlens_q[item : item + 2].tolist())
            keys = slice(*cu_seqlens_k[item : item + 2].tolist())
            blocks = -(-(keys.stop - keys.start) // 128)
            assert not base_blockmask[item, ..., blocks:].any()
            mask = base_blockmask[item : item + 1, ..., :blocks]
            attended = masked_attention(
                *(tokens[None].transpose(1, 2) for tokens in (q[own], k[keys], v[keys])),
                mask if self.obeys else torch.ones_like(mask),
                scale=softmax_scale,
            )
            out[own] = attended[0].transpose(0, 1).to(q.dtype)
        return out


@pytest.fixture
def package(monkeypatch):
    """A machine that has the package, and allows it on the CPU."""
    module = ModuleType("block_sparse_attn")
    module.__spec__ = importlib.machinery.ModuleSpec("block_sparse_attn", None)
    found = Package()
    module.block_sparse_attn_func = found.block_sparse_attn_func
    monkeypatch.setitem(sys.modules, "block_sparse_attn", module)
    monkeypatch.setattr(block_sparse_attn, "cuda_unsupported_reasons", lambda device: [])
    monkeypatch.setattr(torch.cuda, "device", lambda device: torch.device("cpu"))
    block_sparse_attn._check_kernel.cache_clear()
    yield found
    block_sparse_attn._check_kernel.cache_clear()


@pytest.fixture
def capability(monkeypatch):
    """Pretend to have a GPU; call it to choose which."""

    def pretend(major, minor):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (major, minor))

    return pretend


def make_inputs(B, H, Sq, Sk, D=32):
    tensors = [torch.randn(B, S, H, D).half().transpose(1, 2) for S in (Sq, Sk, Sk)]
    return *tensors, torch.rand(B, H, -(-Sq // 128), -(-Sk // 128)) < 0.6


def check(query, key, value, mask, lengths=None):
    """Hold the backend to the formula on these inputs."""
    options = {"key_lengths": lengths}
    found = block_sparse_attention(query, key, value, mask, **options, backend="block_sparse_attn")
    expected = masked_attention(query, key, value, mask, **options)
    same_dtype = masked_attention(query, key, value, mask, **options, dtype=torch.float16)
    assert found.transpose(1, 2).is_contiguous()
    assert_within_budget(found, expected, same_dtype)


@pytest.mark.parametrize(
    ("B", "H", "Sq", "Sk", "lengths"),
    [
        (1, 2, 256, 256, None),
        (1, 1, 257, 257, None),
        (2, 2, 130, 300, None),
        (2, 2, 300, 300, [300, 129]),
        (3, 1, 129, 270, [1, 128, 260]),
    ],
)
def test_masks_lengths_and_layouts_are_handed_over(package, B, H, Sq, Sk, lengths):
    check(*make_inputs(B, H, Sq, Sk), lengths)
    # One call checks the kernel.
    assert len(package.calls) == 2


def test_shared_key_heads_are_handed_over_as_they_are(package):
    query, key, value, mask = make_inputs(2, 4, 130, 300)
    check(query, key[:, :2], value[:, :2], mask, [300, 129])
    assert len(package.calls) == 2


def test_tensors_of_other_layouts_are_packed(package):
    query, key, value, mask = make_inputs(2, 2, 256, 256)
    check(query.contiguous(), key.contiguous(), value.contiguous(), mask)


def test_text_rows_and_columns_are_computed(package):
    """Two prompts: 200 video tokens, then 60 of text, of which 40 and 5 are valid."""
    query, key, value, _ = make_inputs(2, 2, 260, 260)
    options = {"threshold": 0.3, "num_text_tokens": 60, "key_lengths": [240, 205]}
    found, mask = xattention(
        query, key, value, **options, backend="block_sparse_attn", return_block_mask=True
    )
    expected = xattention(query, key, value, **options, backend="torch_gather")
    handed_over = package.calls[-1]
    assert handed_over.shape[-1] == 2
    assert handed_over[:, :, 1].all()
    assert handed_over[:, :, :, 1].all()
    torch.testing.assert_close(handed_over, mask[..., :2])
    for item, length in enumerate(options["key_lengths"]):
        torch.testing.assert_close(
            found[item, :, :length], expected[item, :, :length], atol=2e-3, rtol=1e-2
        )


def test_the_scale_is_handed_over(package):
    query, key, value, mask = make_inputs(1, 1, 128, 128)
    mask[:] = True
    found = block_sparse_attention(query, key, value, mask, scale=0.5, backend="block_sparse_attn")
    expected = masked_attention(query, key, value, mask, scale=0.5)
    torch.testing.assert_close(found.double(), expected, atol=2e-3, rtol=1e-2)


def test_a_kernel_that_ignores_the_mask_is_refused(package):
    package.obeys = False
    with pytest.raises(BackendUnavailableError, match="ignores the blocks and computes dense"):
        check(*make_inputs(1, 1, 128, 128))


def test_a_kernel_that_leaves_rows_unwritten_is_refused(package, monkeypatch):
    def unwritten(q, *arguments, **options):
        return torch.full_like(q, torch.nan)

    monkeypatch.setattr(sys.modules["block_sparse_attn"], "block_sparse_attn_func", unwritten)
    with pytest.raises(BackendUnavailableError, match="is wrong on cpu"):
        check(*make_inputs(1, 1, 128, 128))


def test_every_reason_is_told_at_once():
    problem = Problem(torch.device("cpu"), torch.float32, 48, 64, causal=True)
    reasons = block_sparse_attn.unsupported_reasons(problem)
    words = ["not installed", "CUDA, got cpu", "dtype", "head_dim", "block_size", "causal"]
    assert len(reasons) == len(words)
    for reason, word in zip(reasons, words, strict=True):
        assert word in reason


def test_old_gpus_are_refused(package, capability, monkeypatch):
    monkeypatch.undo()
    capability(7, 5)
    (reason,) = [
        reason
        for reason in block_sparse_attn.unsupported_reasons(GPU)
        if "compute capability" in reason
    ]
    assert "must be 8.0 or more, cuda:0 has 7.5" in reason


def test_it_runs_where_the_package_is(package, capability):
    capability(8, 6)
    assert resolve_backend("block_sparse_attn", GPU) == "block_sparse_attn"
    ragged = dataclasses.replace(GPU, ragged=True)
    assert resolve_backend("block_sparse_attn", ragged) == "block_sparse_attn"


def test_auto_never_takes_it():
    assert all("block_sparse_attn" not in order for order in AUTO_ORDER.values())
