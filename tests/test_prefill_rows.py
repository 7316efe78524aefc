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
    decisions,
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
    assert set(report.dense_reasons) <= {"short chunk", "decode", "too few tokens"}


def test_a_chunk_of_padding_alone_is_counted(llama):
    given = prompt(300, 2, (150, 160))
    with enable_xattention(llama, 0.5, **SMALL) as handle:
        generate(llama, given, prefill_chunk_size=100)
    report = handle.report()
    # In the second chunk they have 50 tokens and 40, and `min_tokens` is 64.
    assert report.dense_reasons == {"padding alone": 2, "too few tokens": 2, "decode": 4}
    assert decisions(report) == {
        "padding alone": 1,
        "too few tokens": 1,
        "sparse": 1,
        "decode": 2,
    }


def test_a_batch_of_padding_alone_is_not_sparse(llama):
    given = prompt(300, 2, (300, 300))
    with enable_xattention(llama, 0.5, **SMALL) as handle, torch.no_grad():
        llama(**given)
    assert handle.report().sparse_tokens == 0
    assert decisions(handle.report()) == {"padding alone": 1}


def test_a_left_padded_item_is_as_it_is_alone(llama):
    """Its blocks begin at its first token."""
    given = prompt(300, 2, (0, 37))
    alone = {"input_ids": given["input_ids"][1:, 37:]}
    with enable_xattention(llama, 0.7, **SMALL) as handle:
        _, together = generate(llama, given)
        _, single = generate(llama, alone)
    assert handle.report().density < 0.9
    torch.testing.assert_close(together[0][1:], single[0], atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("items", [2, 1])
def test_an_item_with_few_tokens_runs_dense_as_it_does_alone(llama, side, items):
    """200 of its 300 tokens are real, and sparse prefill begins at 250."""
    given = prompt(300, 2)
    mask = torch.ones_like(given["input_ids"])
    real = slice(100, None) if side == "left" else slice(200)
    mask[1] = 0
    mask[1, real] = 1
    ids, mask = given["input_ids"][-items:], mask[-items:]
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    options = SMALL | {"min_tokens": 250}
    with torch.no_grad():
        with enable_xattention(llama, 0.3, **options) as handle:
            found = llama(ids, attention_mask=mask, position_ids=positions).logits
        with enable_xattention(llama, 0.3, **options):
            short, long = llama(ids[-1:, real]).logits, llama(ids[:1]).logits
    torch.testing.assert_close(found[-1, real], short[0], atol=TOLERANCE, rtol=0)
    report = handle.report()
    assert report.dense_reasons == {"too few tokens": 2}
    tokens = {one.decision: one.tokens for one in report.forwards}
    if items == 1:
        assert (report.sparse_layers, tokens) == ((), {"too few tokens": 300})
    else:
        torch.testing.assert_close(found[0], long[0], atol=TOLERANCE, rtol=0)
        assert (report.sparse_layers, tokens) == ((0, 1), {"sparse": 300, "too few tokens": 300})


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
