import pytest
import torch

from xattn_video import block_scores, block_sparse_attention, select_blocks, xattention
from xattn_video.compat import Xattention_prefill
from xattn_video.ops.scoring import torch_block_scores


def make_inputs(length=512, heads=2, head_dim=32):
    query, key, value = torch.randn(3, 1, heads, length, head_dim)
    return query * 4, key, value


@pytest.mark.parametrize("causal", [False, True])
def test_the_published_call_is_xattention(causal):
    query, key, value = make_inputs()
    out = Xattention_prefill(
        query_states=query,
        key_states=key,
        value_states=value,
        stride=16,
        threshold=0.7,
        block_size=64,
        use_triton=False,
        causal=causal,
        chunk_size=128,
    )
    expected = xattention(
        query, key, value, stride=16, threshold=0.7, block_size=64, causal=causal
    )
    torch.testing.assert_close(out, expected)


def test_norm_divides_the_estimate_alone():
    query, key, value = make_inputs()
    out = Xattention_prefill(query, key, value, 8, norm=4, block_size=64, causal=False)
    mask = select_blocks(block_scores(query, key, block_size=64, scale=32**-0.5 / 4), 0.8)
    assert torch.equal(out, block_sparse_attention(query, key, value, mask, block_size=64))


def test_sink_and_recent_blocks_are_kept():
    query, key, value = make_inputs()
    scores = block_scores(query, key, block_size=64)
    for option, forced in {
        "keep_sink": torch.arange(8).expand(8, 8) == 0,
        "keep_recent": torch.eye(8, dtype=torch.bool),
    }.items():
        out = Xattention_prefill(
            query, key, value, 8, threshold=0.2, block_size=64, causal=False, **{option: True}
        )
        mask = select_blocks(scores, 0.2, forced=forced)
        assert torch.equal(out, block_sparse_attention(query, key, value, mask, block_size=64))


@pytest.mark.parametrize("layers", [False, True], ids=["of a layer", "of all layers, indexed"])
def test_a_threshold_of_one_dimension_is_per_head(layers):
    """As many heads as rows of blocks: read as rows it would be wrong without a word."""
    query, key, value = make_inputs(length=256, heads=4)
    threshold = torch.tensor([0.2, 0.5, 0.8, 1.0])
    given = torch.stack([torch.ones(4), threshold])[1] if layers else threshold
    out = Xattention_prefill(query, key, value, 8, threshold=given, block_size=64, causal=False)
    options = {"stride": 8, "block_size": 64}
    expected = xattention(query, key, value, threshold=threshold[:, None], **options)
    assert torch.equal(out, expected)
    by_rows = xattention(query, key, value, threshold=threshold, **options)
    assert (out - by_rows).abs().max() > 0.1


def test_a_threshold_of_too_few_heads_is_refused():
    with pytest.raises(ValueError, match=r"one for each query head, \[2\], got \[8\]"):
        Xattention_prefill(*make_inputs(), 8, threshold=torch.full((8,), 0.9), block_size=64)


@pytest.mark.parametrize("use_triton", [None, False])
@pytest.mark.parametrize("chunk_size", [None, 128])
def test_the_chunk_size_bounds_the_scores_in_torch(use_triton, chunk_size, monkeypatch):
    from xattn_video import compat

    seen = []

    def spy(inputs, chunk_size):
        seen.append(chunk_size)
        return torch_block_scores(inputs, chunk_size)

    monkeypatch.setattr(compat, "torch_block_scores", spy)
    options = {"block_size": 64, "chunk_size": chunk_size, "use_triton": use_triton}
    Xattention_prefill(*make_inputs(), 8, **options)
    assert seen == [chunk_size]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kdb": 2}, "kdb must be 1, got 2"),
        ({"norm": 0}, "norm must be positive and finite, got 0"),
        ({"norm": float("nan")}, "norm must be positive and finite, got nan"),
        ({"norm": float("inf")}, "norm must be positive and finite, got inf"),
        ({"chunk_size": 100}, "multiple of block_size=128, got 100"),
        ({"threshold": 2.0}, r"threshold must lie in \(0, 1\]"),
    ],
)
def test_arguments_that_cannot_be_honoured_raise(options, message):
    with pytest.raises(ValueError, match=message):
        Xattention_prefill(*make_inputs(), 8, **options)


def test_triton_by_name_needs_triton(monkeypatch):
    from xattn_video import compat

    monkeypatch.setattr(compat, "triton_unsupported_reasons", lambda *_: ["no GPU here."])
    with pytest.raises(ValueError, match="use_triton=True cannot be honoured: no GPU here"):
        Xattention_prefill(*make_inputs(), 8, use_triton=True)
