"""Key and value heads that serve several query heads each, in every part of the operator."""

import pytest
import torch
from oracle import (
    antidiagonal_block_scores,
    assert_within_budget,
    make_lengths,
    masked_attention,
    repeat_key_heads,
)

from xattn_video import (
    available_backends,
    block_scores,
    block_sparse_attention,
    select_blocks,
    xattention,
)
from xattn_video.compat import Xattention_prefill
from xattn_video.ops.blocks import BlockLists

pytestmark = pytest.mark.usefixtures("poisoned_memory")

DTYPE = {"flash4": torch.bfloat16, "block_sparse_attn": torch.bfloat16}


def make_inputs(B, H, Hkv, Sq, Sk, D, device="cpu", dtype=torch.float32):
    """Views of `[B, S, H, D]` tensors, as Diffusers has them."""
    shapes = (B, Sq, H, D), (B, Sk, Hkv, D), (B, Sk, Hkv, D)
    return [torch.randn(shape, dtype=dtype, device=device).transpose(1, 2) for shape in shapes]


def make_mask(B, H, Sq, Sk, block_size, device="cpu"):
    return torch.rand(B, H, -(-Sq // block_size), -(-Sk // block_size), device=device) < 0.5


CASES = pytest.mark.parametrize(
    ("B", "H", "Hkv", "Sq", "Sk", "causal", "lengths"),
    [
        pytest.param(1, 4, 1, 129, 129, False, None, id="one key head"),
        pytest.param(2, 6, 2, 131, 200, False, [200, 131], id="lengths"),
        pytest.param(2, 4, 2, 130, 200, True, None, id="causal"),
    ],
)


@CASES
def test_scores_in_torch(B, H, Hkv, Sq, Sk, causal, lengths):
    query, key, _ = make_inputs(B, H, Hkv, Sq, Sk, 16)
    options = {"block_size": 64, "causal": causal, "key_lengths": make_lengths(lengths)}
    actual = block_scores(query, key, **options)
    expected = antidiagonal_block_scores(query, key, **options)
    in_float32 = antidiagonal_block_scores(query, key, **options, dtype=torch.float32)
    assert_within_budget(actual, expected, in_float32)


@CASES
def test_scores_by_the_kernel(B, H, Hkv, Sq, Sk, causal, lengths, device):
    pytest.importorskip("triton")
    from xattn_video.kernels.antidiagonal_scores import antidiagonal_scores

    query, key, _ = make_inputs(B, H, Hkv, Sq, Sk, 64, device)
    options = {"block_size": 64, "causal": causal, "key_lengths": make_lengths(lengths, device)}
    actual = antidiagonal_scores(query, key, **options, stride=8, scale=0.125)
    expected = antidiagonal_block_scores(query, key, **options)
    in_float32 = antidiagonal_block_scores(query, key, **options, dtype=torch.float32)
    relative_error = 2**-21 if query.is_cuda else 0.0
    assert_within_budget(actual, expected, in_float32, relative_error=relative_error)


def test_eight_bit_scores_by_the_kernel(device):
    """The same rounded keys, whether a head is repeated or shared."""
    pytest.importorskip("triton")
    from xattn_video.kernels.antidiagonal_scores import antidiagonal_scores, unsupported_reasons

    if unsupported_reasons(device, torch.float32, 64, 64, 8, float8=True):
        pytest.skip("the GPU has no 8-bit products")
    query, key, _ = make_inputs(2, 4, 2, 131, 200, 64, device)
    options = {"block_size": 64, "stride": 8, "causal": False, "scale": 0.125, "float8": True}
    options["key_lengths"] = make_lengths([200, 131], device)
    shared = antidiagonal_scores(query, key, **options)
    repeated = antidiagonal_scores(query, repeat_key_heads(query, key), **options)
    torch.testing.assert_close(shared, repeated)


@CASES
def test_attention_by_the_kernel(B, H, Hkv, Sq, Sk, causal, lengths, device):
    pytest.importorskip("triton")
    from xattn_video.kernels.block_sparse_forward import block_sparse_forward

    inputs = make_inputs(B, H, Hkv, Sq, Sk, 64, device)
    mask = make_mask(B, H, Sq, Sk, 64, device)
    blocks = BlockLists.from_mask(mask)
    options = {"block_size": 64, "causal": causal, "key_lengths": make_lengths(lengths, device)}
    actual, _ = block_sparse_forward(
        *inputs, blocks.counts, blocks.indices, **options, scale=0.125
    )
    expected = masked_attention(*inputs, mask, **options)
    in_float32 = masked_attention(*inputs, mask, **options, dtype=torch.float32)
    assert_within_budget(actual, expected, in_float32)


@CASES
def test_gathered_attention(B, H, Hkv, Sq, Sk, causal, lengths):
    inputs = make_inputs(B, H, Hkv, Sq, Sk, 16)
    mask = make_mask(B, H, Sq, Sk, 64)
    options = {"block_size": 64, "causal": causal, "key_lengths": make_lengths(lengths)}
    actual = block_sparse_attention(*inputs, mask, **options, backend="torch_gather")
    expected = masked_attention(*inputs, mask, **options)
    in_float32 = masked_attention(*inputs, mask, **options, dtype=torch.float32)
    assert_within_budget(actual, expected, in_float32)


def assert_backend_is_right(backend, device, **options):
    dtype = DTYPE.get(backend, torch.float32)
    if available_backends(device, dtype=dtype)[backend]:
        pytest.skip(f"{backend} cannot run here")
    inputs = make_inputs(2, 4, 2, 257, 300, 128, device, dtype)
    mask = make_mask(2, 4, 257, 300, 128, device)
    actual = block_sparse_attention(*inputs, mask, **options, backend=backend)
    expected = masked_attention(*inputs, mask, **options)
    same_dtype = masked_attention(*inputs, mask, **options, dtype=dtype)
    assert_within_budget(actual, expected, same_dtype)


def test_flex_on_a_cpu():
    assert_backend_is_right("flex", torch.device("cpu"), key_lengths=make_lengths([300, 129]))


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["flash4", "triton", "flex", "block_sparse_attn"])
def test_every_backend_on_a_gpu(backend, device):
    assert_backend_is_right(backend, device)


def test_the_whole_operator():
    query, key, value = make_inputs(1, 4, 2, 320, 320, 32)
    options = {"threshold": 0.6, "stride": 4, "block_size": 64, "return_block_mask": True}
    out, mask = xattention(query * 4, key, value, **options)
    assert mask.shape == (1, 4, 5, 5)
    assert torch.equal(
        mask, select_blocks(block_scores(query * 4, key, stride=4, block_size=64), 0.6)
    )
    assert not torch.equal(mask[:, 0], mask[:, 1])
    repeated, repeated_mask = xattention(
        query * 4, repeat_key_heads(query, key), repeat_key_heads(query, value), **options
    )
    assert torch.equal(mask, repeated_mask)
    torch.testing.assert_close(out, repeated)


def test_the_published_call():
    query, key, value = make_inputs(1, 4, 2, 256, 256, 32)
    out = Xattention_prefill(query, key, value, stride=8, block_size=64)
    repeated = [repeat_key_heads(query, tokens) for tokens in (key, value)]
    torch.testing.assert_close(out, Xattention_prefill(query, *repeated, stride=8, block_size=64))


def test_heads_that_do_not_divide_are_refused():
    query, key, value = make_inputs(1, 4, 3, 128, 128, 16)
    with pytest.raises(
        ValueError, match="must divide those of query, got 4 query heads and 3 key"
    ):
        xattention(query, key, value)
