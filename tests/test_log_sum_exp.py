"""The log-sum-exp that `attend` returns, by every backend that gives one."""

import pytest
import torch
from oracle import assert_within_budget, make_lengths, masked_log_sum_exp

from xattn_video import BackendUnavailableError, BlockLists, attend
from xattn_video.backends.table import AUTO_ORDER, load_backend
from xattn_video.ops.attention import compute_attention
from xattn_video.ops.problem import AttentionInputs, Problem

BACKENDS = ["flash4", "triton", "flex", "torch_gather"]
BFLOAT16 = pytest.param(torch.bfloat16, marks=pytest.mark.gpu)


def make_inputs(B, H, Hkv, Sq, Sk, D, block_size, device, dtype):
    shapes = [(H, Sq), (Hkv, Sk), (Hkv, Sk)]
    tensors = [
        torch.randn(B, S, heads, D, device=device).to(dtype).transpose(1, 2) for heads, S in shapes
    ]
    mask = torch.rand(B, H, -(-Sq // block_size), -(-Sk // block_size), device=device) < 0.5
    mask[0, 0, 0] = False
    mask[-1, -1, -1] = True
    return *tensors, mask


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, BFLOAT16])
@pytest.mark.parametrize(
    ("B", "H", "Hkv", "Sq", "Sk", "D", "block_size", "causal", "lengths", "scale"),
    [
        pytest.param(1, 2, 2, 257, 257, 64, 128, False, None, None, id="ragged end"),
        pytest.param(2, 2, 1, 200, 257, 32, 64, True, [257, 130], None, id="causal, shared heads"),
        pytest.param(1, 1, 1, 200, 130, 64, 64, True, None, None, id="queries that see no key"),
        pytest.param(2, 1, 1, 130, 130, 64, 64, False, [130, 64], -0.7, id="any scale"),
    ],
)
@pytest.mark.parametrize("name", BACKENDS)
def test_it_is_the_formula(
    name, B, H, Hkv, Sq, Sk, D, block_size, causal, lengths, scale, dtype, device
):
    problem = Problem(device, dtype, D, block_size, causal, lengths is not None, lse=True)
    if reasons := load_backend(name).unsupported_reasons(problem):
        pytest.skip("; ".join(reasons))
    query, key, value, mask = make_inputs(B, H, Hkv, Sq, Sk, D, block_size, device, dtype)
    options = {"block_size": block_size, "causal": causal}
    own_lengths = make_lengths(lengths, device)
    inputs = AttentionInputs(
        query,
        key,
        value,
        BlockLists.from_mask(mask),
        key_lengths=own_lengths,
        scale=D**-0.5 if scale is None else scale,
        **options,
    )
    out, lse = compute_attention(inputs, name, return_lse=True)
    assert lse is not None
    assert lse.dtype == torch.float32
    options |= {"key_lengths": lengths, "scale": scale}
    expected = masked_log_sum_exp(query, key, mask, **options)
    same_dtype = masked_log_sum_exp(query, key, mask, **options, dtype=dtype)
    sees = expected.isfinite()
    assert not sees.all()
    assert (lse.cpu()[~sees] == -torch.inf).all()
    assert_within_budget(lse.cpu()[sees], expected[sees], same_dtype[sees])
    alone, none = compute_attention(inputs, name)
    assert none is None
    assert torch.equal(alone, out)


def test_large_products_keep_their_logarithm(device):
    """The sum of exponentials itself would overflow."""
    query, key, value, mask = make_inputs(1, 1, 1, 130, 200, 64, 64, device, torch.float32)
    for name in ("triton", "torch_gather"):
        blocks = BlockLists.from_mask(mask)
        _, lse = attend(
            query * 40, key, value, blocks, block_size=64, backend=name, return_lse=True
        )
        expected = masked_log_sum_exp(query * 40, key, mask, block_size=64)
        assert expected.max() > 100
        torch.testing.assert_close(lse.cpu().double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["triton", "torch_gather"])
def test_two_halves_of_the_blocks_make_the_whole(name, device):
    """What it is for: parts that were attended apart are put together."""
    query, key, value, mask = make_inputs(1, 2, 2, 200, 257, 64, 64, device, torch.float32)
    everything = torch.ones_like(mask)

    def part(mask):
        blocks = BlockLists.from_mask(mask)
        return attend(query, key, value, blocks, block_size=64, backend=name, return_lse=True)

    whole, whole_lse = part(everything)
    outs, lses = zip(part(mask), part(~mask), strict=True)
    lse = torch.stack(lses).logsumexp(dim=0)
    out = sum(
        torch.exp(part_lse - lse)[..., None] * part_out
        for part_out, part_lse in zip(outs, lses, strict=True)
    )
    torch.testing.assert_close(lse, whole_lse)
    torch.testing.assert_close(out, whole)


def test_it_compiles_into_one_graph(device):
    query, key, value, mask = make_inputs(1, 2, 2, 200, 257, 64, 64, device, torch.float32)
    blocks = BlockLists.from_mask(mask)

    def layer(query, key, value, blocks):
        return attend(query, key, value, blocks, block_size=64, return_lse=True)

    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    expected = layer(query, key, value, blocks)
    torch.testing.assert_close(compiled(query, key, value, blocks), expected)


@pytest.mark.parametrize("name", ["flex", "block_sparse_attn"])
def test_a_backend_without_one_is_refused(name):
    query, key, value, mask = make_inputs(1, 1, 1, 200, 257, 64, 128, "cpu", torch.float32)
    blocks = BlockLists.from_mask(mask)
    with pytest.raises(BackendUnavailableError, match=r"return.* log-sum-exp.*; use backend"):
        attend(query, key, value, blocks, backend=name, return_lse=True)


def test_auto_passes_over_a_backend_without_one(monkeypatch):
    query, key, value, mask = make_inputs(1, 1, 1, 200, 257, 64, 128, "cpu", torch.float32)
    monkeypatch.setitem(AUTO_ORDER, "cpu", ("flex", "torch_gather"))
    blocks = BlockLists.from_mask(mask)
    _, lse = attend(query, key, value, blocks, return_lse=True)
    assert lse.shape == (1, 1, 200)
