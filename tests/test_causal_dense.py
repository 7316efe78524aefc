"""Dense causal attention of a chunk of queries, and the number of blocks that it computes."""

import pytest
import torch
import torch.nn.functional as F
from oracle import assert_within_budget

from xattn_video.language import causal_dense
from xattn_video.ops.blocks import count_causal_blocks


def plain(query, key, value, scale, dtype=torch.float64):
    """The formula, with a mask of all queries and keys."""
    Sq, Sk = query.shape[2], key.shape[2]
    mask = torch.ones(Sq, Sk, dtype=torch.bool, device=query.device).tril(Sk - Sq)
    inputs = (tensor.to(dtype) for tensor in (query, key, value))
    return F.scaled_dot_product_attention(*inputs, mask, scale=scale, enable_gqa=True)


@pytest.mark.parametrize("sizes", [(300, 300), (300, 517), (1, 40), (129, 130)])
@pytest.mark.parametrize("heads", [2, 4])
def test_it_is_causal_at_the_end(sizes, heads, monkeypatch):
    # A mask has so few entries that every case but the square one takes several.
    monkeypatch.setattr(causal_dense, "_LARGEST_MASK", 0)
    Sq, Sk = sizes
    query = torch.randn(2, 4, Sq, 16)
    key, value = torch.randn(2, 2, heads, Sk, 16)
    found = causal_dense.dense_causal_attention(query, key, value, 0.3)
    expected = plain(query, key, value, 0.3)
    assert_within_budget(found, expected, plain(query, key, value, 0.3, query.dtype))


@pytest.mark.gpu
@pytest.mark.parametrize("sizes", [(300, 300), (300, 517), (129, 4000)])
@pytest.mark.parametrize("head_dim", [64, 96, 128])
def test_it_is_causal_at_the_end_on_a_gpu(sizes, head_dim):
    """By flash-attn-4 on Hopper where that is installed and takes the size, else by PyTorch."""
    Sq, Sk = sizes
    query = torch.randn(1, 8, Sq, head_dim, device="cuda", dtype=torch.bfloat16)
    key, value = torch.randn(2, 1, 2, Sk, head_dim, device="cuda", dtype=torch.bfloat16)
    found = causal_dense.dense_causal_attention(query, key, value, 0.1)
    expected = plain(query, key, value, 0.1)
    assert_within_budget(found, expected, plain(query, key, value, 0.1, query.dtype))


@pytest.mark.parametrize("block_size", [1, 16, 128])
@pytest.mark.parametrize("sizes", [(1, 1), (1, 300), (16, 16), (300, 300), (300, 517), (130, 257)])
def test_the_blocks_are_those_that_hold_a_visible_key(block_size, sizes):
    Sq, Sk = sizes
    count = 0
    for first in range(0, Sq, block_size):
        last_key = min(first + block_size, Sq) - 1 + Sk - Sq
        count += last_key // block_size + 1
    assert count_causal_blocks(Sq, Sk, block_size) == count
