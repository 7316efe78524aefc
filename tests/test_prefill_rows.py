"""Rows of blocks in a prefill: the last one, those that hold padding, and very long ones."""

import pytest
import torch
import torch.nn.functional as F
from language_models import NEARLY_ALL, SMALL, TOLERANCE, prompt, tiny_model
from oracle import assert_within_budget

from xattn_video import enable_xattention, xattention


@pytest.fixture(scope="module")
def llama():
    return tiny_model("llama")


def test_the_last_row_of_blocks_which_holds_the_question_is_sparse_like_the_others(llama):
    """300 tokens are 18 blocks of 16 and 12 tokens."""
    given = prompt()
    llama.set_attn_implementation("sdpa")
    with torch.no_grad():
        dense = llama(**given).logits[0]
        with enable_xattention(llama, 0.3, **SMALL) as handle:
            sparse = llama(**given).logits[0]
        with enable_xattention(llama, 0.3, **SMALL) as shorter:
            whole_blocks = llama(given["input_ids"][:, :288]).logits[0]
    # Neither it nor the tokens before it are spared, and rows before do not depend on it.
    changed = (sparse - dense).abs().amax(-1)
    assert (changed[-12:] > TOLERANCE).all()
    torch.testing.assert_close(sparse[:288], whole_blocks, atol=TOLERANCE, rtol=0)
    assert handle.report().dense_reasons == shorter.report().dense_reasons == {}


def test_right_padding_without_a_mask_changes_rows_that_share_its_blocks_alone(llama):
    """As lm-eval asks for likelihoods: 200 tokens are 12 blocks of 16 and 8 tokens."""
    ids = prompt()["input_ids"]
    padded = ids.clone()
    padded[:, 200:] = 0
    with torch.no_grad():
        with enable_xattention(llama, 0.5, **SMALL):
            alone = llama(ids[:, :200]).logits
            found = llama(padded).logits[:, :200]
        with enable_xattention(llama, NEARLY_ALL, **SMALL):
            right = llama(padded).logits[:, :200]
        llama.set_attn_implementation("sdpa")
        dense = llama(ids[:, :200]).logits
    torch.testing.assert_close(found[:, :192], alone[:, :192], atol=TOLERANCE, rtol=0)
    # Chosen together with padding, so that they are others; no row sees a padding token.
    assert not torch.allclose(found[:, 192:], alone[:, 192:], atol=TOLERANCE, rtol=0)
    torch.testing.assert_close(right, dense, atol=TOLERANCE, rtol=0)


def test_a_row_of_more_blocks_than_the_selection_kernel_takes(device):
    """A chunk of 8 tokens after 65,544 keys: 8,193 blocks of 8."""
    Sq, Sk = 8, 8193 * 8
    query, key, value = (torch.randn(1, 1, n, 16, device=device) for n in (Sq, Sk, Sk))
    # One far block holds nearly all that a query looks at.
    key[:, :, 40_000:40_008] = 3 * query.mean(dim=2, keepdim=True)
    out, mask = xattention(
        query,
        key,
        value,
        threshold=0.9,
        block_size=8,
        stride=4,
        causal=True,
        backend="torch_gather",
        return_block_mask=True,
    )
    assert mask.shape == (1, 1, 1, 8193)
    assert mask[..., [0, 5000, 8192]].all()
    assert mask.sum() < 8193
    visible = torch.ones(Sq, Sk, dtype=torch.bool, device=device).tril(Sk - Sq)
    visible &= mask.repeat_interleave(8, dim=-1)[0, 0]

    def plain(dtype):
        return F.scaled_dot_product_attention(
            query.to(dtype), key.to(dtype), value.to(dtype), visible
        )

    assert_within_budget(out, plain(torch.float64), plain(torch.float32))
