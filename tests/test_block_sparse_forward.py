import pytest
import torch
from oracle import assert_within_budget, make_lengths, masked_attention

from xattn_video.ops.blocks import BlockLists

pytest.importorskip("triton")

from xattn_video.kernels import block_sparse_forward as kernel
from xattn_video.kernels.block_sparse_forward import block_sparse_forward

pytestmark = pytest.mark.usefixtures("poisoned_memory")

BFLOAT16 = pytest.param(torch.bfloat16, marks=pytest.mark.gpu)


def make_inputs(B, H, Sq, Sk, D, device, dtype=torch.float32):
    """Views of `[B, S, H, D]` tensors, as Diffusers has them."""
    return tuple(
        torch.randn(B, S, H, D, dtype=dtype, device=device).transpose(1, 2) for S in (Sq, Sk, Sk)
    )


def make_mask(B, H, Sq, Sk, block_size, device, density=0.4):
    return torch.rand(B, H, -(-Sq // block_size), -(-Sk // block_size), device=device) < density


def attend(query, key, value, mask, *, block_size=64, causal=False, key_lengths=None, scale=None):
    blocks = BlockLists.from_mask(mask)
    return block_sparse_forward(
        query,
        key,
        value,
        blocks.counts,
        blocks.indices,
        block_size=block_size,
        causal=causal,
        key_lengths=key_lengths,
        scale=query.shape[-1] ** -0.5 if scale is None else scale,
    )[0]


def assert_is_masked_attention(query, key, value, mask, *, relative_error=0.0, **options):
    actual = attend(query, key, value, mask, **options)
    expected = masked_attention(query, key, value, mask, **options)
    same_dtype = masked_attention(query, key, value, mask, **options, dtype=query.dtype)
    assert actual.dtype == query.dtype
    assert_within_budget(actual, expected, same_dtype, relative_error=relative_error)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, BFLOAT16])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    ("B", "H", "Sq", "Sk", "D", "block_size", "lengths"),
    [
        pytest.param(1, 1, 128, 128, 64, 128, None, id="one block"),
        pytest.param(1, 2, 129, 129, 64, 128, None, id="one token over"),
        pytest.param(1, 2, 127, 127, 128, 64, None, id="one short"),
        pytest.param(2, 1, 997, 997, 128, 128, [997, 613], id="prime"),
        pytest.param(2, 2, 130, 453, 64, 64, [453, 131], id="more keys"),
        pytest.param(1, 1, 453, 130, 80, 64, None, id="fewer keys"),
        pytest.param(2, 1, 130, 200, 256, 128, [1, 128], id="wide head"),
    ],
)
def test_attention_over_the_mask(B, H, Sq, Sk, D, block_size, lengths, causal, dtype, device):
    assert_is_masked_attention(
        *make_inputs(B, H, Sq, Sk, D, device, dtype),
        make_mask(B, H, Sq, Sk, block_size, device),
        block_size=block_size,
        causal=causal,
        key_lengths=make_lengths(lengths, device),
    )


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("D", "block_size"), [(64, 64), (64, 128), (128, 64), (128, 128)])
def test_more_blocks_than_multiprocessors(D, block_size, dtype, device):
    assert_is_masked_attention(
        *make_inputs(2, 4, 4001, 3001, D, device, dtype),
        make_mask(2, 4, 4001, 3001, block_size, device),
        block_size=block_size,
        key_lengths=make_lengths([3001, 1234], device),
    )


def test_a_row_without_blocks_gives_zero(device):
    query, key, value = make_inputs(1, 2, 200, 200, 64, device)
    mask = make_mask(1, 2, 200, 200, 64, device, density=1.0)
    mask[0, 1, 2] = False
    out = attend(query, key, value, mask)
    assert (out[0, 1, 128:192] == 0).all()
    assert (out[0, 1, :128] != 0).any()
    assert (attend(query, key, value, torch.zeros_like(mask)) == 0).all()


def test_blocks_that_no_query_sees_add_nothing(device):
    """Above the diagonal, or past the keys' end, a kept block is as one left out."""
    inputs = make_inputs(2, 1, 256, 256, 64, device)
    lengths = make_lengths([256, 100], device)
    everything = torch.ones(2, 1, 4, 4, dtype=torch.bool, device=device)
    visible = everything.tril()
    visible[1, :, :, 2:] = False
    options = {"causal": True, "key_lengths": lengths}
    expected = attend(*inputs, visible, **options)
    assert torch.equal(attend(*inputs, everything, **options), expected)


def test_only_the_counted_indices_are_read(device):
    query, key, value = make_inputs(1, 1, 200, 256, 64, device)
    blocks = BlockLists.from_mask(make_mask(1, 1, 200, 256, 64, device))
    counts, indices = blocks.counts, blocks.indices
    options = {"block_size": 64, "causal": False, "key_lengths": None, "scale": 0.125}
    expected, _ = block_sparse_forward(query, key, value, counts, indices, **options)
    position = torch.arange(4, dtype=torch.int32, device=device)
    indices = torch.where(position < counts[..., None], indices, 1 << 30)
    actual, _ = block_sparse_forward(query, key, value, counts, indices, **options)
    assert torch.equal(actual, expected)


def test_padding_is_not_read(device):
    query, key, value = make_inputs(2, 1, 200, 200, 64, device)
    mask = make_mask(2, 1, 200, 200, 64, device, density=1.0)
    lengths = make_lengths([200, 70], device)
    expected = attend(query, key, value, mask, key_lengths=lengths)
    key[1, :, 70:] = torch.nan
    value[1, :, 70:] = torch.nan
    assert torch.equal(attend(query, key, value, mask, key_lengths=lengths), expected)


def test_large_products_do_not_overflow(device):
    query, key, value = make_inputs(1, 1, 130, 200, 64, device)
    mask = make_mask(1, 1, 130, 200, 64, device, density=0.7)
    assert_is_masked_attention(query * 50, key * 50, value, mask, block_size=64)


@pytest.mark.parametrize("scale", [0.0, -0.3, 0.7])
def test_any_scale(scale, device):
    inputs = make_inputs(1, 1, 130, 200, 64, device)
    mask = make_mask(1, 1, 130, 200, 64, device)
    assert_is_masked_attention(*inputs, mask, block_size=64, scale=scale)


def test_the_output_is_laid_out_as_diffusers_wants_it(device):
    query, key, value = make_inputs(2, 3, 130, 200, 64, device)
    mask = make_mask(2, 3, 130, 200, 64, device)
    out = attend(query.contiguous(), key, value, mask)
    assert out.transpose(1, 2).is_contiguous()
    assert torch.equal(out, attend(query, key, value, mask))


def test_a_last_dimension_that_is_not_dense(device):
    query, key, value = make_inputs(1, 1, 130, 200, 64, device)
    mask = make_mask(1, 1, 130, 200, 64, device)
    scattered = value.transpose(2, 3).contiguous().transpose(2, 3)
    assert torch.equal(attend(query, key, scattered, mask), attend(query, key, value, mask))


def test_offsets_beyond_32_bits(device):
    tokens, stride = 65, 2**25
    # 4 GiB, of which only the pages that hold a token are ever touched.
    storage = torch.UntypedStorage(2 * tokens * stride, device=device)
    sparse = torch.tensor([], dtype=torch.float16, device=device)
    sparse.set_(storage, 0, (1, 1, tokens, 64), (1, 1, stride, 1))
    sparse.copy_(torch.randn(1, 1, tokens, 64))
    dense = sparse.contiguous()
    mask = torch.ones(1, 1, 2, 2, dtype=torch.bool, device=device)
    actual = attend(sparse, sparse, sparse, mask)
    assert torch.equal(actual, attend(dense, dense, dense, mask))


@pytest.mark.parametrize("dtype", [torch.float32, BFLOAT16])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("norm", [1.0, 2.5, 8.0])
def test_bounded_and_unbounded_products(norm, causal, dtype, device, monkeypatch):
    """Of products up to +-norm^2 * 8 natural units: below, near and beyond the largest bound."""
    monkeypatch.setattr(kernel, "_BOUNDED_DTYPES", (dtype,))
    query, key, value = make_inputs(2, 2, 200, 450, 64, device, dtype)
    query[:, :, 64:128] *= 0.01
    query, key = (norm * 8 * x / x.norm(dim=-1).max() for x in (query, key))
    # One query along the longest key and one against it reach the bound from both sides.
    longest = key[0, 0, :131].norm(dim=-1).argmax()
    query[0, 0, 3] = key[0, 0, longest] * (norm * 8 / key[0, 0, longest].norm())
    query[0, 0, 4] = -query[0, 0, 3]
    assert_is_masked_attention(
        query,
        key,
        value,
        make_mask(2, 2, 200, 450, 64, device, density=0.7),
        block_size=64,
        causal=causal,
        key_lengths=make_lengths([450, 131], device),
        # A difference of up to 128 powers of two, rounded to 24 bits.
        relative_error=2**-18 if dtype == torch.float32 else 0.0,
    )


@pytest.mark.parametrize("dtype", [torch.float32, BFLOAT16])
@pytest.mark.parametrize("bound", [70.0, 80.0, 110.0, 140.0])
def test_products_that_all_lie_opposite_to_their_bound(bound, dtype, device, monkeypatch):
    """Every key points away from the query: below the largest bound alone their weights are left.

    The bound is in powers of two.
    """
    monkeypatch.setattr(kernel, "_BOUNDED_DTYPES", (dtype,))
    _, key, value = make_inputs(1, 1, 64, 64, 64, device, dtype)
    key = torch.ones_like(key)
    # Norm of a key 8, scale 1 / 8: the bound of a query is its norm * log2(e).
    query = torch.full_like(key, -bound / 1.4427 / 8)
    mask = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device)
    # A sum of 64 products is as large as the bound; its last bits depend on the order of the sum,
    # which processors choose for themselves.
    assert_is_masked_attention(query, key, value, mask, relative_error=bound * 2**-21)
