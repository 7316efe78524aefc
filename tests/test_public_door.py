"""What the public functions say to arguments that are of a wrong kind."""

from functools import partial

import numpy as np
import pytest
import torch

import xattn_video
from xattn_video import BlockLists
from xattn_video.compat import Xattention_prefill

QUERY, KEY, VALUE = torch.randn(3, 1, 2, 128, 16)
MASK = torch.ones(1, 2, 2, 2, dtype=torch.bool)
BLOCKS = BlockLists.from_mask(MASK)
SCORES = torch.rand(1, 2, 2, 2)

# What stands for a tensor, and how the message calls it.
NO_TENSORS = {
    "None": (lambda _: None, "None"),
    "list": (lambda tensor: tensor.tolist(), "a list"),
    "str": (lambda _: "abc", "'abc'"),
    "numpy": (lambda tensor: tensor.numpy(), "a numpy.ndarray"),
    "sparse": (lambda tensor: tensor.to_sparse(), "torch.sparse_coo"),
    "nested": (lambda tensor: torch.nested.nested_tensor(list(tensor)), "nested"),
    "meta": (lambda tensor: tensor.to("meta"), "meta"),
}

FUNCTIONS = {
    "xattention": (
        partial(xattn_video.xattention, block_size=64),
        {"query": QUERY, "key": KEY, "value": VALUE},
    ),
    "select": (partial(xattn_video.select, block_size=64), {"query": QUERY, "key": KEY}),
    "attend": (
        partial(xattn_video.attend, block_size=64),
        {"query": QUERY, "key": KEY, "value": VALUE, "blocks": BLOCKS},
    ),
    "block_scores": (
        partial(xattn_video.block_scores, block_size=64),
        {"query": QUERY, "key": KEY},
    ),
    "select_blocks": (xattn_video.select_blocks, {"scores": SCORES, "threshold": 0.9}),
    "block_sparse_attention": (
        partial(xattn_video.block_sparse_attention, block_size=64),
        {"query": QUERY, "key": KEY, "value": VALUE, "block_mask": MASK},
    ),
    "Xattention_prefill": (
        partial(Xattention_prefill, stride=8, block_size=64),
        {"query_states": QUERY, "key_states": KEY, "value_states": VALUE},
    ),
    "available_backends": (xattn_video.available_backends, {"device": "cpu"}),
}

TENSORS = [
    (function, name)
    for function, (_, arguments) in FUNCTIONS.items()
    for name, given in arguments.items()
    if isinstance(given, torch.Tensor)
]


def call(function, **changes):
    run, arguments = FUNCTIONS[function]
    return run(**(arguments | changes))


@pytest.mark.parametrize("function", FUNCTIONS)
def test_the_arguments_that_are_spoiled_below_are_right(function):
    call(function)


@pytest.mark.parametrize("wrong", NO_TENSORS)
@pytest.mark.parametrize(("function", "name"), TENSORS)
def test_what_is_no_usable_tensor_is_named(function, name, wrong):
    spoil, found = NO_TENSORS[wrong]
    changes = {name: spoil(FUNCTIONS[function][1][name])}
    with pytest.raises((TypeError, ValueError), match=rf"^{name} must be .*got .*{found}"):
        call(function, **changes)


@pytest.mark.parametrize("wrong", ["sparse", "nested", "meta"])
@pytest.mark.parametrize("function", ["xattention", "select", "select_blocks"])
def test_a_threshold_that_is_no_dense_tensor_is_named(function, wrong):
    threshold = NO_TENSORS[wrong][0](torch.full((2, 1), 0.9))
    with pytest.raises((TypeError, ValueError), match=r"^threshold must be .*got "):
        call(function, threshold=threshold)


@pytest.mark.parametrize("function", ["xattention", "select", "select_blocks"])
@pytest.mark.parametrize(
    "threshold", [None, [0.9], "0.9", True, np.array([0.9]), torch.tensor([True])]
)
def test_a_threshold_of_no_numbers_is_named(function, threshold):
    with pytest.raises(TypeError, match=r"^threshold must "):
        call(function, threshold=threshold)


@pytest.mark.parametrize("wrong", ["str", "sparse", "nested", "meta"])
@pytest.mark.parametrize(
    "function", ["xattention", "select", "attend", "block_scores", "block_sparse_attention"]
)
def test_key_lengths_of_a_wrong_kind_are_named(function, wrong):
    key_lengths = NO_TENSORS[wrong][0](torch.tensor([128]))
    if wrong == "nested":
        key_lengths = torch.nested.nested_tensor([torch.tensor([128])])
    with pytest.raises((TypeError, ValueError), match=r"^key_lengths must "):
        call(function, key_lengths=key_lengths)


@pytest.mark.parametrize("key_lengths", [["a"], [None], [1.5], [[100]], 100, object()])
def test_key_lengths_that_are_no_integers_are_named(key_lengths):
    with pytest.raises((TypeError, ValueError), match=r"^key_lengths must "):
        call("xattention", key_lengths=key_lengths)


@pytest.mark.parametrize("wrong", [w for w in NO_TENSORS if w != "None"])
def test_forced_of_a_wrong_kind_is_named(wrong):
    with pytest.raises((TypeError, ValueError), match=r"^forced must be .*got "):
        call("select_blocks", forced=NO_TENSORS[wrong][0](MASK))


@pytest.mark.parametrize("blocks", [None, MASK, (BLOCKS.counts, BLOCKS.indices)])
def test_blocks_of_another_type_are_named(blocks):
    with pytest.raises(TypeError, match=r"^blocks must be BlockLists.*got a "):
        call("attend", blocks=blocks)


@pytest.mark.parametrize(
    "blocks",
    [
        BlockLists(BLOCKS.counts.long(), BLOCKS.indices),
        BlockLists(BLOCKS.counts, BLOCKS.indices.tolist()),
        BlockLists(BLOCKS.counts.to("meta"), BLOCKS.indices),
    ],
)
def test_blocks_of_wrong_tensors_are_named(blocks):
    with pytest.raises((TypeError, ValueError), match=r"^blocks.* must .*got "):
        call("attend", blocks=blocks)


ATTENDING = ["xattention", "attend", "block_sparse_attention"]
SCORING = ["xattention", "select", "block_scores"]
ALL = [*ATTENDING, "select", "block_scores"]


@pytest.mark.parametrize(
    ("function", "name", "value"),
    [
        *((f, "causal", v) for f in ALL for v in (None, "yes", 1)),
        *((f, "scale", v) for f in ALL for v in ("1", [1.0], float("nan"))),
        *((f, "backend", v) for f in ATTENDING for v in (None, 3, ["triton"])),
        *((f, "block_size", v) for f in ALL for v in (None, "64", 64.0)),
        *((f, "stride", v) for f in SCORING for v in (None, "8", [8])),
        *((f, "num_text_tokens", v) for f in ("xattention", "select") for v in (None, 1.0, "1")),
        *((f, "scoring_precision", v) for f in ("xattention", "select") for v in (None, 8)),
        ("block_scores", "precision", None),
        ("attend", "return_lse", None),
        ("xattention", "return_block_mask", "yes"),
        *(("Xattention_prefill", "causal", v) for v in (None, "yes")),
        *(("Xattention_prefill", "threshold", v) for v in (None, [0.9], "0.9")),
        *(("Xattention_prefill", "norm", v) for v in (None, "1")),
        *(("Xattention_prefill", "kdb", v) for v in (None, "1")),
        *(("Xattention_prefill", "chunk_size", v) for v in ("64", 64.0)),
        *(("Xattention_prefill", "stride", v) for v in (None, "8")),
        *(("Xattention_prefill", "block_size", v) for v in (None, 64.0)),
        ("Xattention_prefill", "use_triton", "yes"),
        ("Xattention_prefill", "keep_sink", None),
        ("Xattention_prefill", "keep_recent", 1),
        *(("available_backends", "device", v) for v in ([], 3.5, "no-such-device")),
        *(("available_backends", "dtype", v) for v in ("float16", np.float16)),
        *(("available_backends", "head_dim", v) for v in (None, "128", 0)),
        *(("available_backends", "block_size", v) for v in (None, 128.0, -1)),
    ],
)
def test_an_option_of_a_wrong_kind_is_named(function, name, value):
    # `precision` of block_scores is "scoring precision" in the other messages.
    with pytest.raises((TypeError, ValueError), match=rf"^{name} must .*got "):
        call(function, **{name: value})
