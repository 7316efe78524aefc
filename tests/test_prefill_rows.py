"""Rows of blocks in a prefill: the last one, those that hold padding, and very long ones."""

import pytest
import torch
import torch.nn.functional as F
from language_models import (
    HOWS,
    NEARLY_ALL,
    SMALL,
    TOLERANCE,
    assert_as_sdpa,
    generate,
    prompt,
    tiny_model,
)
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


@pytest.mark.parametrize("how", ["plain", "chunks", "static"])
def test_left_padded_items_are_those_of_sdpa(llama, how):
    # The last item's first chunk is padding alone.
    report = assert_as_sdpa(llama, prompt(300, 3, (0, 37, 150)), **HOWS[how])
    assert set(report.dense_reasons) <= {"short chunk", "decode"}


def test_a_chunk_of_padding_alone_is_counted(llama):
    given = prompt(300, 2, (150, 160))
    with enable_xattention(llama, 0.5, **SMALL) as handle:
        generate(llama, given, prefill_chunk_size=100)
    assert handle.report().dense_reasons == {"padding alone": 2, "decode": 4}


def test_a_left_padded_item_is_as_it_is_alone(llama):
    """Its blocks begin at its first token."""
    given = prompt(300, 2, (0, 37))
    alone = {"input_ids": given["input_ids"][1:, 37:]}
    with enable_xattention(llama, 0.7, **SMALL) as handle:
        _, together = generate(llama, given)
        _, single = generate(llama, alone)
    assert handle.report().density < 0.9
    torch.testing.assert_close(together[0][1:], single[0], atol=TOLERANCE, rtol=0)


def test_right_padding_changes_no_row_that_is_read(llama):
    given = prompt(300, 2)
    mask = torch.ones_like(given["input_ids"])
    mask[1, 200:] = 0
    llama.set_attn_implementation("sdpa")
    with torch.no_grad():
        expected = llama(**given, attention_mask=mask).logits
        with enable_xattention(llama, NEARLY_ALL, **SMALL) as handle:
            found = llama(**given, attention_mask=mask).logits
    assert handle.report().sparse_layers == (0, 1)
    torch.testing.assert_close(found[0], expected[0], atol=TOLERANCE, rtol=0)
    torch.testing.assert_close(found[1, :200], expected[1, :200], atol=TOLERANCE, rtol=0)


def test_a_right_padded_item_is_as_it_is_alone(llama):
    """Its last blocks are chosen without the padding that shares them: 200 is 12 x 16 + 8."""
    given = prompt(300, 2)
    mask = torch.ones_like(given["input_ids"])
    mask[1, 200:] = 0
    with torch.no_grad(), enable_xattention(llama, 0.5, **SMALL):
        found = llama(**given, attention_mask=mask).logits[1, :200]
        alone = llama(given["input_ids"][1:, :200]).logits[0]
    assert torch.equal(found, alone)


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
