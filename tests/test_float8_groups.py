import pytest
import torch

pytest.importorskip("triton")

from xattn_video.kernels.antidiagonal_scores import antidiagonal_scores
from xattn_video.kernels.float8_groups import quantize_groups, sampled_mean
from xattn_video.ops.scoring import ScoringInputs, torch_block_scores

pytestmark = pytest.mark.usefixtures("poisoned_memory")

FLOAT8 = pytest.param(torch.bfloat16, marks=pytest.mark.gpu)


def restore(quantized, scales, stride):
    """The numbers that 8 bits and scales stand for."""
    return quantized.float() * scales.repeat_interleave(stride, dim=-1)[..., None]


def repeat_last(tokens, stride, lengths):
    """Tokens up to whole groups, those beyond an item's length being its last."""
    index = torch.arange(-(-tokens.shape[2] // stride) * stride, device=tokens.device)
    return torch.stack(
        [item[:, index.clamp(max=n - 1)] for item, n in zip(tokens, lengths, strict=True)]
    )


@pytest.mark.parametrize("stride", [4, 16])
def test_a_group_spans_the_whole_range(stride, device):
    tokens = torch.randn(2, 2, 37, 48, device=device) * torch.logspace(-3, 3, 37)[:, None].to(
        device
    )
    lengths = torch.tensor([37, 21], dtype=torch.int32, device=device)
    quantized, scales = quantize_groups(tokens, stride, lengths=lengths)
    assert quantized.shape == (2, 2, -(-37 // stride) * stride, 48)
    expected = repeat_last(tokens, stride, lengths.tolist())
    largest = expected.unflatten(2, (-1, stride)).abs().amax(dim=(3, 4))
    torch.testing.assert_close(scales * 448, largest)
    # The interpreter rounds to e4m3 less well than a GPU does.
    step = largest.repeat_interleave(stride, dim=-1)[..., None] / (14 if tokens.is_cuda else 3)
    assert ((restore(quantized, scales, stride) - expected).abs() <= step).all()


@pytest.mark.gpu
def test_rounding_is_that_of_torch(device):
    tokens = torch.randn(1, 2, 64, 128, device=device)
    quantized, scales = quantize_groups(tokens, 8)
    expected = (tokens / scales.repeat_interleave(8, dim=-1)[..., None]).to(torch.float8_e4m3fn)
    differ = (quantized.float() != expected.float()).float().mean()
    assert differ < 1e-3


def test_a_group_of_zeros_has_a_scale(device):
    quantized, scales = quantize_groups(torch.zeros(1, 1, 16, 16, device=device), 8)
    assert (scales == 1).all()
    assert (quantized.float() == 0).all()


def test_the_mean_is_of_valid_tokens(device):
    tokens = torch.randn(2, 1, 20, 16, device=device)
    lengths = torch.tensor([20, 9], dtype=torch.int32, device=device)
    tokens[1, :, 9:] = torch.nan
    mean = sampled_mean(tokens, 4, lengths)
    torch.testing.assert_close(mean[0], tokens[0, :, ::4].mean(1))
    torch.testing.assert_close(mean[1], tokens[1, :, :9:4].mean(1))


@pytest.mark.parametrize("dtype", [torch.float32, FLOAT8])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    ("stride", "Sq", "Sk", "lengths"), [(8, 130, 200, None), (16, 100, 141, [141, 70])]
)
def test_scores_are_those_of_the_rounded_tokens(stride, Sq, Sk, lengths, causal, dtype, device):
    B = 1 if lengths is None else len(lengths)
    query = torch.randn(B, 2, Sq, 64, device=device, dtype=dtype)
    key = torch.randn(B, 2, Sk, 64, device=device, dtype=dtype) + 3
    if lengths is not None:
        lengths = torch.tensor(lengths, dtype=torch.int32, device=device)
    options = {"block_size": 64, "stride": stride, "causal": causal, "key_lengths": lengths}
    actual = antidiagonal_scores(query, key, **options, scale=0.125, float8=True)
    shift = sampled_mean(key, 64, lengths)
    rounded_query = restore(*quantize_groups(query, stride), stride)[:, :, :Sq]
    rounded_key = restore(*quantize_groups(key, stride, lengths=lengths, shift=shift), stride)
    expected = torch_block_scores(
        ScoringInputs(rounded_query, rounded_key[:, :, :Sk], **options, scale=0.125)
    )
    torch.testing.assert_close(actual, expected, rtol=1e-3 if query.is_cuda else 1e-4, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("stride", [8, 16])
def test_eight_bits_score_nearly_the_same(stride, device):
    query = torch.randn(1, 2, 4113, 128, device=device).bfloat16() * 2
    key = (
        torch.randn(1, 2, 3990, 128, device=device) + 5 * torch.randn(128, device=device)
    ).bfloat16()
    options = {"block_size": 128, "stride": stride, "causal": False, "key_lengths": None}
    exact = antidiagonal_scores(query, key, **options, scale=128**-0.5)
    rounded = antidiagonal_scores(query, key, **options, scale=128**-0.5, float8=True)
    assert (rounded - exact).abs().max() < 0.05 * exact.max()
