"""Where a forward pass of a language model runs sparse: the decision alone."""

import pytest
import torch
from transformers.masking_utils import and_masks, causal_mask_function

from xattn_video.language.masks import CausalBounds, MaskRequest, decide_prefill


def bounds(first, last, stop, sparse=True):
    return CausalBounds(first, last, stop, (sparse,) * len(first))


def decide(block_size=128, min_tokens=0, **request):
    with torch.no_grad():
        return decide_prefill(
            MaskRequest(**{"batch_size": 1, "q_length": 300, "kv_length": 300, **request}),
            block_size=block_size,
            min_tokens=min_tokens,
        )


@pytest.mark.parametrize(
    ("request_", "expected"),
    [
        ({}, bounds((0,), (300,), 300)),
        ({"batch_size": 2}, bounds((0, 0), (300, 300), 300)),
        ({"q_length": 1}, "decode"),
        ({"q_length": 127}, "short chunk"),
        ({"min_tokens": 301}, bounds((0,), (300,), 300, sparse=False)),
        ({"min_tokens": 300}, bounds((0,), (300,), 300)),
        ({"local_size": 1000}, "window"),
        ({"kv_offset": 3}, "other mask"),
        ({"allow_is_causal_skip": False}, "other mask"),
        ({"mask_function": and_masks(causal_mask_function)}, "other mask"),
        ({"q_length": 301}, "other mask"),
        # An empty static cache, and a later chunk in it, whose offset is a tensor.
        ({"kv_length": 1000}, bounds((0,), (300,), 300)),
        ({"kv_length": 1000, "q_offset": torch.tensor(400)}, bounds((0,), (700,), 700)),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else str(value),
)
def test_the_decision(request_, expected):
    assert decide(**request_) == expected


def test_gradients_decide_before_sizes():
    request = MaskRequest(batch_size=1, q_length=300, kv_length=300)
    assert decide_prefill(request, block_size=128, min_tokens=9999) == "gradients"


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        (["11111", "11111"], [(0, 0), (5, 5)]),
        (["00111", "11111"], [(2, 0), (5, 5)]),
        (["11100", "01110"], [(0, 1), (3, 4)]),
        (["11011", "11111"], None),
        (["00000", "11111"], [(5, 0), (5, 5)]),
        (["1111", "1111"], None),
        # Beyond the last query: a mask that was made for the whole of a static cache.
        (["0111100", "1111100"], [(1, 0), (5, 5)]),
    ],
)
def test_the_valid_keys_of_padded_items(rows, expected):
    mask = torch.tensor([[mark == "1" for mark in row] for row in rows])
    found = decide(block_size=1, batch_size=2, q_length=5, kv_length=9, attention_mask=mask)
    assert found == ("gaps" if expected is None else bounds(*expected, 5))


def test_few_padded_tokens_share_one_mask():
    """Short prompts of a batch would gain nothing from running item by item."""
    mask = torch.ones(2, 300, dtype=torch.bool)
    request = {"batch_size": 2, "min_tokens": 301, "attention_mask": mask}
    assert decide(**request) == bounds((0, 0), (300, 300), 300, sparse=False)
    mask[0, 0] = False
    assert decide(**request) == "too few tokens"


def test_an_item_with_few_tokens_is_dense_beside_a_long_one():
    mask = torch.ones(4, 300, dtype=torch.bool)
    mask[1, :101], mask[2, 200:], mask[3, :100] = False, False, False
    found = decide(batch_size=4, min_tokens=200, attention_mask=mask)
    assert found.sparse == (True, False, True, True)


def test_the_rows_of_items_in_a_later_chunk():
    found = bounds((0, 250, 0, 300), (300, 300, 200, 300), 300).rows(100)
    assert found == (slice(0, 100), slice(50, 100), slice(0, 0), slice(100, 100))


@pytest.mark.parametrize("sparse", [(True,) * 3, (True, False, True), (False,) * 3])
def test_bounds_pass_as_a_mask(sparse):
    three = CausalBounds((0, 17, 3), (300, 300, 200), 300, sparse)
    mask = three.to_tensor()
    assert (mask.dtype, mask.shape) == (torch.int64, (3, 1, 1, 5))
    assert CausalBounds.of(mask) == three
    assert CausalBounds.of(None) is None
    assert CausalBounds.of(torch.ones(1, 1, 1, 5, dtype=torch.bool)) is None
    assert CausalBounds.of(torch.zeros(1, 1, 5, 5)) is None
    # A user's mask for five keys.
    assert CausalBounds.of(torch.ones(2, 1, 1, 5, dtype=torch.int64)) is None
