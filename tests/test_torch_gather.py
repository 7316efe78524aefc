"""How rows of blocks share calls where the kept blocks are gathered."""

import pytest
import torch
from oracle import assert_within_budget, masked_attention

from xattn_video import block_sparse_attention
from xattn_video.backends import torch_gather


@pytest.mark.parametrize(("Sq", "Sk"), [(512, 512), (256, 500)])
def test_causal_rows_that_keep_equally_many_blocks_share_a_call(Sq, Sk, monkeypatch):
    """Only the end of the keys and queries that see none need a call of their own."""
    inputs = [torch.randn(1, 2, length, 16) for length in (Sq, Sk, Sk)]
    calls = {"_attend": [], "_attend_rows": []}
    for name, made in calls.items():
        plain = getattr(torch_gather, name)
        monkeypatch.setattr(
            torch_gather, name, lambda *args, p=plain, m=made: m.append(args) or p(*args)
        )
    numbers = torch.arange(-(-Sk // 64))
    rows = torch.arange(Sq // 64)[:, None] + (Sk - Sq) // 64
    # Key block 0, and the two blocks that a row may see a part of.
    mask = (numbers == 0) | (numbers == rows) | (numbers == rows + 1)
    mask = mask.expand(1, 2, -1, -1)
    out = block_sparse_attention(*inputs, mask, block_size=64, causal=True)
    assert_within_budget(
        out,
        masked_attention(*inputs, mask, block_size=64, causal=True),
        masked_attention(*inputs, mask, block_size=64, causal=True, dtype=torch.float32),
    )
    assert len(calls["_attend"]) == 2 * (Sk % 64 > 0)
    assert max(len(args[3]) for args in calls["_attend_rows"]) == torch_gather._ROWS_AT_ONCE
