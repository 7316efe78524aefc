"""What stands for skipped blocks, held to plain loops in float64."""

import itertools
import math

import pytest
import torch
from hunyuan import run, with_processor

from xattn_video.kernels.support import INTERPRETING
from xattn_video.ops.attention import attend
from xattn_video.ops.blocks import BlockLists
from xattn_video.ops.compensation import compensate, error_weights
from xattn_video.ops.problem import AttentionInputs
from xattn_video.policy.decision import Decision
from xattn_video.policy.settings import SparseSettings
from xattn_video.processors import engine
from xattn_video.processors.layout import TokenLayout
from xattn_video.processors.recorder import ForwardPass

BOTH = pytest.mark.parametrize("first_order", [False, True], ids=["means", "first-order"])


def problem(batch=1, heads=2, tokens=150, head_dim=16, block_size=32, dtype=torch.float32, **to):
    """Queries, keys and values, and a mask that computes the blocks from the fourth on."""
    tensors = torch.randn(3, batch, heads, tokens, head_dim).mul(1.5).to(dtype=dtype, **to)
    query, key, value = tensors.unbind()
    # Keys and values of a block have a mean, and depend on each other.
    value = value + key.roll(1, -1) + torch.arange(tokens, device=key.device)[:, None] / tokens
    rows = -(-tokens // block_size)
    mask = torch.rand(batch, heads, rows, rows) < 0.4
    mask[..., tokens // block_size :] = True
    mask[:, :, -1] = True
    return query, key, value.to(dtype), mask.to(query.device)


def compensated(query, key, value, mask, num_blocks, first_order, block_size=32, backend="auto"):
    blocks = BlockLists.from_mask(mask)
    out, lse = attend(
        query, key, value, blocks, block_size=block_size, return_lse=True, backend=backend
    )
    inputs = AttentionInputs(
        query, key, value, blocks, block_size, False, None, query.shape[-1] ** -0.5
    )
    return compensate(inputs, out.clone(), lse, num_blocks, first_order)


def expected(query, key, value, mask, num_blocks, first_order, block_size=32):
    """The formulas of docs/fewer-blocks.md, query by query."""
    query, key, value = query.double(), key.double(), value.double()
    scale, out = query.shape[-1] ** -0.5, torch.zeros_like(query)
    for b, h, t in torch.cartesian_prod(*map(torch.arange, query.shape[:3])).tolist():
        row, q = t // block_size, query[b, h, t]
        rows = slice(row * block_size, (row + 1) * block_size)
        mean_query = query[b, h, rows].mean(dim=0)
        total, numerator, skipped = 0.0, 0.0, []
        for j in range(mask.shape[-1]):
            keys, values = (
                one[b, h, j * block_size : (j + 1) * block_size] for one in (key, value)
            )
            if mask[b, h, row, j]:
                weights = (keys @ q * scale).exp()
                total, numerator = total + weights.sum(), numerator + weights @ values
            elif j < num_blocks:
                mean = keys.mean(dim=0)
                covariance = (keys - mean).mT @ values / block_size
                mass = block_size * math.exp(q @ mean * scale)
                weight = math.exp(mean_query @ mean * scale)
                skipped.append((mass, weight, values.mean(dim=0), covariance))
        mass = sum(one[0] for one in skipped)
        numerator = numerator + sum(one[0] * one[2] for one in skipped)
        if first_order and skipped:
            covariance = sum(one[1] * one[3] for one in skipped) / sum(one[1] for one in skipped)
            numerator = numerator + mass * scale * (q @ covariance)
        out[b, h, t] = numerator / (total + mass)
    return out


def assert_as_the_formula(*inputs):
    found = compensated(*inputs).double()
    torch.testing.assert_close(found, expected(*inputs), rtol=0, atol=1e-5)


@BOTH
@pytest.mark.parametrize("tokens", [128, 150])
def test_the_formulas(first_order, tokens):
    assert_as_the_formula(*problem(batch=2, tokens=tokens), tokens // 32, first_order)


@BOTH
def test_blocks_beyond_the_video_are_left_out(first_order):
    query, key, value, mask = problem()
    mask[..., 2:4] = False
    assert_as_the_formula(query, key, value, mask, 2, first_order)


def test_rows_that_skip_nothing_stay_as_they_are():
    query, key, value, mask = problem()
    mask[:] = True
    out = compensated(query, key, value, mask, 4, True)
    assert torch.equal(out, attend(query, key, value, BlockLists.from_mask(mask), block_size=32))


def test_rows_that_see_no_key_are_finite():
    query, key, value, mask = problem()
    mask[:, :, 1] = False
    assert compensated(query, key, value, mask, 0, True).isfinite().all()
    assert compensated(query, key, value, mask, 4, True).isfinite().all()


def test_equal_keys_and_values_in_a_block_make_it_exact():
    query, key, value, mask = problem(tokens=128)
    key, value = (one[:, :, ::32].repeat_interleave(32, 2) for one in (key, value))
    dense = torch.nn.functional.scaled_dot_product_attention(query, key, value)
    torch.testing.assert_close(compensated(query, key, value, mask, 4, False), dense)


def test_the_linear_term_is_nearer_to_dense_attention():
    query, key, value, mask = problem(tokens=256)
    query = query.view(1, 2, 8, 32, 16).mean(3, keepdim=True).add(query.view(1, 2, 8, 32, 16) / 8)
    inputs = (query.view(1, 2, 256, 16), key / 2, value, mask)
    dense = torch.nn.functional.scaled_dot_product_attention(*inputs[:3])
    error = [(compensated(*inputs, 8, order) - dense).norm().item() for order in (False, True)]
    assert error[1] < 0.5 * error[0]


def test_covariances_fit_in_float16_where_sums_do_not():
    query, key, value, mask = problem(tokens=128)
    # 32 products of about 8 x 800 a block.
    key, value = key * 4, key.roll(1, -1) * 800
    inputs = ((query / 16).half(), key.half(), value.half(), mask, 4, True)
    found, exact = compensated(*inputs).double(), expected(*inputs)
    assert (found - exact).norm() < 0.01 * exact.norm()
    assert error_weights(*inputs[1:3], 32, 4).isfinite().all()


def test_weights_are_the_norms_of_covariances():
    _, key, value, _ = problem()
    found = error_weights(key, value, 32, 4)
    assert found.shape == (1, 2, 5)
    assert (found[..., 4] == 1).all()
    keys, values = key[0, 1, 32:64].double(), value[0, 1, 32:64].double()
    covariance = (keys - keys.mean(0)).mT @ values / 32
    assert found[0, 1, 1].item() == pytest.approx(covariance.norm().item(), rel=1e-5)


def test_weights_take_float64():
    _, key, value, _ = problem()
    expected = error_weights(key, value, 32, 4)
    torch.testing.assert_close(error_weights(key.double(), value.double(), 32, 4), expected)


@BOTH
@pytest.mark.skipif(not INTERPRETING and not torch.cuda.is_available(), reason="needs Triton")
@pytest.mark.parametrize("head_dim", [16, 48])
def test_the_kernel_gives_the_same(first_order, head_dim, device):
    query, key, value, mask = problem(2, 1, 140, head_dim, 64, device=device)
    inputs = query, key, value, mask, 2
    # [B, S, H, D] behind, as from a transformer.
    strided = [one.transpose(1, 2).contiguous().transpose(1, 2) for one in inputs[:3]]
    torch.testing.assert_close(
        error_weights(*strided[1:], 64, 2).cpu(),
        error_weights(*(one.cpu() for one in inputs[1:3]), 64, 2),
    )
    torch.testing.assert_close(
        compensated(*strided, mask, 2, first_order, 64).double().cpu(),
        expected(*inputs, first_order, 64).cpu(),
        rtol=0,
        atol=2e-5,
    )


@BOTH
@pytest.mark.skipif(not INTERPRETING and not torch.cuda.is_available(), reason="needs Triton")
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]
)
def test_the_kernel_takes_masses_far_apart(first_order, dtype, device):
    """Skipped blocks with 1e6 times the mass of the computed ones, or a millionth of it."""
    query, key, value, mask = problem(1, 1, 512, 128, 128, dtype, device=device)
    mask[:, :, :3, :3] = ~torch.eye(3, dtype=torch.bool, device=device)
    direction = query.mean((0, 1, 2)) + 1
    query = query * 0.1 + direction
    key = key * 0.1
    key[:, :, :128] += 14 * 128**0.5 * direction / direction.square().sum()
    inputs = query, key, value, mask, 3
    torch.testing.assert_close(
        compensated(*inputs, first_order, 128).double().cpu(),
        expected(*(one.cpu() for one in inputs[:4]), 3, first_order, 128),
        rtol=0,
        atol={torch.float32: 2e-5, torch.float16: 0.02, torch.bfloat16: 0.1}[dtype],
    )


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["triton", "flex", "torch_gather"])
def test_every_backend_gives_the_same(backend, device):
    query, key, value, mask = problem(1, 8, 1200, 128, 128, torch.bfloat16, device=device)
    found = compensated(query, key, value, mask, 9, True, 128, backend)
    reference = expected(query, key, value, mask, 9, True, 128).cpu()
    torch.testing.assert_close(found.double().cpu(), reference, rtol=0, atol=0.05)


@BOTH
@pytest.mark.parametrize("lengths", [(10,), (10, 3)])
def test_a_layer_leaves_the_text_to_the_computed_blocks(first_order, lengths):
    """Keys and values that are equal in each block of video make means exact, whatever the text.

    So does the linear term, which is 0.
    """
    compensation = "first-order" if first_order else "means"
    settings = SparseSettings(
        density=0.5, stride=4, block_size=8, min_tokens=0, compensation=compensation
    )
    query, key, value = torch.randn(3, len(lengths), 60, 2, 16).unbind()
    for one in (key, value):
        one[:, :48] = one[:, :48:8].repeat_interleave(8, dim=1)
    layout = TokenLayout(48, 12, lengths, torch.device("cpu"))
    forward = ForwardPass(
        settings,
        Decision(None, ((0.5, 0.5),), None, (False,), (True,)),
        layout,
        torch.tensor(layout.key_lengths, dtype=torch.int32) if layout.ragged else None,
        "torch_gather",
        None,
        None,
        engine.sparse_attention,
        (),
    )
    found, blocks = engine.sparse_attention(query, key, value, torch.tensor(0.5), forward)
    dense = engine.dense_attention(query, key, value, layout, None)
    assert blocks.counts[:, :, :6].max() < 8
    for item, length in enumerate(layout.key_lengths):
        torch.testing.assert_close(found[item, :length], dense[item, :length])


def test_a_processor_compensates():
    plain, _ = with_processor(None, density=0.4)
    outs = [run(plain)]
    for compensation in ("means", "first-order"):
        model, processor = with_processor(None, density=0.4, compensation=compensation)
        outs.append(run(model))
        assert processor.report().density < 1
    assert not any(torch.allclose(*pair) for pair in itertools.combinations(outs, 2))
