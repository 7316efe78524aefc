import pytest
import torch
from oracle import antidiagonal_block_scores, assert_within_budget, order_error

from xattn_video import block_scores
from xattn_video.ops import scoring
from xattn_video.ops.problem import Problem
from xattn_video.ops.scoring import ScoringInputs, torch_block_scores


def make_pair(B, H, Sq, Sk, D, dtype=torch.float32):
    return torch.randn(B, H, Sq, D, dtype=dtype) * 2, torch.randn(B, H, Sk, D, dtype=dtype) * 2


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    ("B", "H", "Sq", "Sk", "D", "block_size", "stride"),
    [
        (1, 1, 64, 64, 64, 64, 8),
        (1, 2, 129, 129, 64, 128, 8),
        (2, 1, 127, 127, 16, 64, 4),
        (1, 1, 997, 997, 32, 128, 16),
        (1, 2, 200, 453, 64, 64, 8),
        (1, 1, 130, 300, 48, 128, 1),
        (1, 1, 70, 75, 32, 64, 64),
    ],
)
def test_scores_are_the_formula(B, H, Sq, Sk, D, block_size, stride, causal):
    query, key = make_pair(B, H, Sq, Sk, D)
    options = {"block_size": block_size, "stride": stride, "causal": causal}
    expected = antidiagonal_block_scores(query, key, **options)
    in_float32 = antidiagonal_block_scores(query, key, **options, dtype=torch.float32)
    actual = block_scores(query, key, **options)
    assert actual.dtype == torch.float32
    assert_within_budget(actual, expected, in_float32, relative_error=order_error(stride, D))
    torch.testing.assert_close(actual.sum(-1), torch.ones(actual.shape[:-1]))


def test_half_precision_inputs_are_compared_in_float32():
    query, key = make_pair(1, 1, 200, 200, 64, torch.bfloat16)
    expected = antidiagonal_block_scores(query, key)
    in_float32 = antidiagonal_block_scores(query, key, dtype=torch.float32)
    actual = block_scores(query, key)
    assert_within_budget(actual, expected, in_float32, relative_error=order_error(8, 64))


@pytest.mark.parametrize("causal", [False, True])
def test_each_item_of_a_batch_has_its_own_key_length(causal):
    query, key = make_pair(3, 2, 300, 300, 32)
    lengths = torch.tensor([300, 131, 1])
    options = {"block_size": 64, "stride": 8, "causal": causal, "key_lengths": lengths}
    expected = antidiagonal_block_scores(query, key, **options)
    in_float32 = antidiagonal_block_scores(query, key, **options, dtype=torch.float32)
    actual = block_scores(query, key, **options)
    assert_within_budget(actual, expected, in_float32, relative_error=order_error(8, 32))
    assert (actual[1, :, :, 3:] == 0).all()
    assert (actual[2, :, :, 0] == 1).all()


def test_eight_bits_are_refused_where_no_kernel_runs(monkeypatch):
    """Never answered with exact scores."""
    from xattn_video.ops import scoring

    reasons = ["the device must be CUDA."]
    monkeypatch.setattr(scoring, "triton_unsupported_reasons", lambda *_, **options: reasons)
    with pytest.raises(ValueError, match=r'"float8" is not available: the device must be CUDA'):
        block_scores(*make_pair(1, 1, 64, 64, 16), precision="float8")


@pytest.mark.parametrize(
    ("tokens", "dtype", "capability", "reasons", "float8"),
    [
        pytest.param(65536, torch.bfloat16, (9, 0), [], True, id="hopper"),
        pytest.param(65535, torch.bfloat16, (9, 0), [], False, id="few tokens"),
        pytest.param(65536, torch.float32, (9, 0), [], False, id="float32"),
        pytest.param(65536, torch.bfloat16, (8, 9), [], False, id="not measured"),
        pytest.param(65536, torch.bfloat16, (9, 0), ["stride"], False, id="no kernel"),
    ],
)
def test_eight_bits_are_taken_where_they_were_measured_to_pay(
    tokens, dtype, capability, reasons, float8, monkeypatch
):
    support = pytest.importorskip("xattn_video.kernels.support")
    from xattn_video.ops import scoring

    monkeypatch.setattr(scoring, "triton_unsupported_reasons", lambda *_, **options: reasons)
    monkeypatch.setattr(support, "nvidia_capability", lambda device: capability)
    problem = Problem(torch.device("cuda"), dtype, 128, 128)
    assert scoring._float8_pays(problem, 8, tokens) == float8
    cpu = Problem(torch.device("cpu"), dtype, 128, 128)
    assert not scoring._float8_pays(cpu, 8, tokens)


def test_an_automatic_precision_is_exact_on_a_cpu():
    query, key = make_pair(1, 1, 256, 256, 16)
    assert torch.equal(block_scores(query, key, precision="auto"), block_scores(query, key))


def test_an_unknown_precision_is_refused():
    with pytest.raises(ValueError, match="or \"float8\", got 'int8'"):
        block_scores(*make_pair(1, 1, 64, 64, 16), precision="int8")


def test_padding_takes_no_mass():
    """Zero-padded keys, as the authors' code pads them, would take mass: exp(0) is not 0."""
    query, key = make_pair(1, 1, 256, 256, 32)
    key[:, :, 100:] = 0
    padded = block_scores(query, key, block_size=64)
    cut = block_scores(query, key, block_size=64, key_lengths=torch.tensor([100]))
    assert padded[0, 0, 0, 2:].min() > 0.01
    assert cut[0, 0, 0, 2:].max() == 0
    torch.testing.assert_close(
        cut[..., :2], block_scores(query, key[:, :, :100].contiguous(), block_size=64)
    )


def test_values_beyond_the_key_length_do_not_matter():
    query, key = make_pair(1, 1, 200, 200, 32)
    lengths = torch.tensor([77])
    expected = block_scores(query, key, block_size=64, key_lengths=lengths)
    key[:, :, 77:] = torch.nan
    assert torch.equal(block_scores(query, key, block_size=64, key_lengths=lengths), expected)


def test_a_transposed_view_scores_as_its_copy():
    query, key = (torch.randn(1, 300, 2, 32) for _ in range(2))
    views = query.transpose(1, 2), key.transpose(1, 2)
    copies = (view.contiguous() for view in views)
    assert torch.equal(block_scores(*views), block_scores(*copies))


def test_chunks_do_not_change_the_scores():
    query, key = make_pair(1, 2, 700, 700, 32)
    inputs = ScoringInputs(query, key, 64, 8, causal=True, key_lengths=None, scale=0.1)
    whole = torch_block_scores(inputs)
    chunked = torch_block_scores(inputs, chunk_size=128)
    torch.testing.assert_close(chunked, whole, rtol=1e-6, atol=1e-7)


def test_a_valid_block_never_scores_zero():
    query, key = torch.rand(1, 1, 256, 32), torch.rand(1, 1, 256, 32)
    key[:, :, :64] += 1e3
    scores = block_scores(query, key, block_size=64)
    assert (scores > 0).all()
    assert (scores[..., 1:] == torch.finfo(torch.float32).tiny).any()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_broken_query_breaks_its_row_of_blocks_alone(bad):
    query, key = make_pair(1, 1, 256, 256, 32)
    query[0, 0, 70, 3] = bad
    scores = block_scores(query, key, block_size=64, key_lengths=torch.tensor([130]))
    assert scores[0, 0, 1, :3].isnan().all()
    assert scores[0, 0, 1, 3] == 0
    assert scores[0, 0, [0, 2, 3]].isfinite().all()


def test_stride_that_does_not_divide_is_refused():
    query, key = make_pair(1, 1, 128, 128, 16)
    with pytest.raises(ValueError, match=r"stride=12, block_size=128; use 1, 2, 4, 8, 16, 32, 64"):
        block_scores(query, key, stride=12)


@pytest.mark.parametrize("lengths", [[0, 5], [129, 5]])
def test_key_lengths_out_of_range_are_refused(lengths):
    query, key = make_pair(2, 1, 128, 128, 16)
    with pytest.raises(ValueError, match=r"between 1 and Sk=128, got \[\d+, 5\]"):
        block_scores(query, key, key_lengths=torch.tensor(lengths))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8], ids=str)
def test_key_lengths_may_be_of_a_type_that_does_not_hold_the_number_of_keys(dtype):
    query, key = make_pair(2, 1, 300, 300, 16)
    lengths = torch.tensor([100, 44])
    expected = block_scores(query, key, block_size=64, key_lengths=lengths)
    found = block_scores(query, key, block_size=64, key_lengths=lengths.to(dtype))
    assert torch.equal(found, expected)
    with pytest.raises(ValueError, match=r"between 1 and Sk=300, got \[0, 100\]"):
        block_scores(query, key, key_lengths=torch.tensor([0, 100], dtype=dtype))


def test_key_lengths_of_another_batch_are_refused():
    query, key = make_pair(2, 1, 128, 128, 16)
    with pytest.raises(ValueError, match=r"one integer per item of the batch, \[2\]"):
        block_scores(query, key, key_lengths=torch.tensor([5, 5, 5]))


def test_key_lengths_without_numbers_are_refused():
    query, key = make_pair(2, 1, 128, 128, 16)
    with pytest.raises(ValueError, match=r"key_lengths must .*, got \[2\] on the meta device"):
        block_scores(query, key, key_lengths=torch.ones(2, dtype=torch.int32, device="meta"))


def test_mismatched_pairs_are_refused_with_their_shapes():
    query, key = make_pair(1, 2, 128, 128, 16)
    with pytest.raises(ValueError, match=r"query \[1, 2, 128, 16\], key \[1, 2, 128, 8\]"):
        block_scores(query, key[..., :8])
    with pytest.raises(ValueError, match=r"share one dtype, got query torch.float32, key torch"):
        block_scores(query, key.half())
    with pytest.raises(ValueError, match=r"key must .* on the meta device"):
        block_scores(query, key.to("meta"))
    with pytest.raises(ValueError, match=r"must be \[B, H, S, D\]"):
        block_scores(query[0], key[0])
    with pytest.raises(TypeError, match="must be float32, float16 or bfloat16"):
        block_scores(query.long(), key.long())
    with pytest.raises(ValueError, match="query is empty"):
        block_scores(query[:, :, :0], key)
    with pytest.raises(ValueError, match="causal attention needs Sq <= Sk, got Sq=128, Sk=64"):
        block_scores(query, key[:, :, :64], causal=True)


@pytest.mark.parametrize(("Sq", "Sk"), [(256, 256), (250, 401)])
def test_causal_queries_are_not_multiplied_with_keys_above_the_diagonal(Sq, Sk, monkeypatch):
    shapes = []
    multiply = scoring._multiply_heads
    monkeypatch.setattr(
        scoring,
        "_multiply_heads",
        lambda rows, columns: shapes.append(columns.shape[-1]) or multiply(rows, columns),
    )
    query, key = torch.randn(1, 2, Sq, 16), torch.randn(1, 1, Sk, 16)
    options = {"block_size": 64, "stride": 8, "causal": True}
    inputs = scoring.ScoringInputs(query, key, **options, key_lengths=None, scale=0.25)
    actual = scoring.torch_block_scores(inputs, chunk_size=64)
    expected = antidiagonal_block_scores(query, key, **options, scale=0.25)
    torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-7)
    ends = [min(stop, Sq) + Sk - Sq for stop in range(64, Sq + 64, 64)]
    assert shapes == [-(-end // 8) for end in ends]


def test_auto_looks_at_the_shorter_of_queries_and_keys(monkeypatch):
    seen = []
    monkeypatch.setattr(
        scoring, "_float8_pays", lambda problem, stride, tokens: seen.append(tokens)
    )
    for lengths in ((300, 200), (200, 300)):
        block_scores(*make_pair(1, 1, *lengths, 16), precision="auto")
        scoring._choose_scorer.cache_clear()
    assert seen == [200, 200]
