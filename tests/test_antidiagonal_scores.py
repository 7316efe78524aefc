import pytest
import torch
from oracle import antidiagonal_block_scores, assert_within_budget, make_lengths, order_error

pytest.importorskip("triton")

from xattn_video.kernels import antidiagonal_scores as kernel
from xattn_video.kernels import support
from xattn_video.kernels.antidiagonal_scores import antidiagonal_scores, unsupported_reasons
from xattn_video.kernels.scoring_tiles import Rectangle, Tiles, rectangles, seen_tiles
from xattn_video.kernels.support import fits_descriptor

pytestmark = pytest.mark.usefixtures("poisoned_memory")

BFLOAT16 = pytest.param(torch.bfloat16, marks=pytest.mark.gpu)


def make_pair(B, H, Sq, Sk, D, device, dtype=torch.float32):
    """Views of `[B, S, H, D]` tensors, as Diffusers has them."""
    query = torch.randn(B, Sq, H, D, dtype=dtype, device=device).transpose(1, 2) * 2
    key = torch.randn(B, Sk, H, D, dtype=dtype, device=device).transpose(1, 2) * 2
    return query, key


def scores_of(query, key, *, block_size=128, stride=8, causal=False, key_lengths=None, scale=None):
    return antidiagonal_scores(
        query,
        key,
        block_size=block_size,
        stride=stride,
        causal=causal,
        key_lengths=key_lengths,
        scale=query.shape[-1] ** -0.5 if scale is None else scale,
    )


def assert_is_the_formula(query, key, **options):
    """Within the budget of float32 where interpreted; a GPU's tensor cores add less exactly."""
    actual = scores_of(query, key, **options)
    expected = antidiagonal_block_scores(query, key, **options)
    dtype = query.dtype if query.is_cuda else torch.float32
    same_dtype = antidiagonal_block_scores(query, key, **options, dtype=dtype)
    assert actual.dtype == torch.float32
    relative_error = 0.0
    if query.is_cuda:
        # PTX's ex2.approx errs by up to 2**-22, in the numerator and in the denominator.
        relative_error = 2**-21 + order_error(options.get("stride", 8), query.shape[-1])
    assert_within_budget(actual, expected, same_dtype, relative_error=relative_error)
    assert torch.equal(actual.cpu() > 0, expected > 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, BFLOAT16])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    ("B", "H", "Sq", "Sk", "D", "block_size", "stride", "lengths"),
    [
        pytest.param(1, 1, 128, 128, 64, 128, 8, None, id="one block"),
        pytest.param(1, 2, 129, 129, 64, 128, 8, None, id="one token over"),
        pytest.param(1, 2, 127, 127, 128, 64, 16, None, id="one short"),
        pytest.param(2, 1, 997, 997, 128, 128, 16, [997, 613], id="prime"),
        pytest.param(2, 1, 130, 453, 64, 64, 4, [453, 131], id="more keys"),
        pytest.param(1, 1, 453, 130, 80, 64, 8, None, id="fewer keys"),
        pytest.param(1, 2, 531, 600, 16, 64, 4, None, id="several tiles"),
        pytest.param(2, 1, 200, 200, 16, 64, 8, [1, 65], id="one key"),
        pytest.param(1, 1, 130, 200, 32, 128, 1, None, id="stride 1"),
        pytest.param(1, 1, 130, 200, 16, 64, 64, None, id="stride of a block"),
    ],
)
def test_scores_are_the_formula(
    B, H, Sq, Sk, D, block_size, stride, lengths, causal, dtype, device
):
    query, key = make_pair(B, H, Sq, Sk, D, device, dtype)
    assert_is_the_formula(
        query,
        key,
        block_size=block_size,
        stride=stride,
        causal=causal,
        key_lengths=make_lengths(lengths, device),
    )


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("stride", [4, 8, 16])
def test_more_tiles_than_multiprocessors(stride, dtype, device):
    query, key = make_pair(2, 5, 32 * 997, 997, 128, device, dtype)
    assert_is_the_formula(query, key, stride=stride, key_lengths=make_lengths([997, 700], device))


@pytest.mark.parametrize("causal", [False, True])
def test_every_row_sums_to_one(causal, device):
    query, key = make_pair(2, 1, 453, 500, 64, device)
    lengths = make_lengths([500, 100], device)
    sums = scores_of(query, key, block_size=64, causal=causal, key_lengths=lengths).sum(-1)
    torch.testing.assert_close(sums, torch.ones_like(sums))


@pytest.mark.parametrize("descriptors", [False, True])
@pytest.mark.parametrize(("Sq", "Sk"), [(1024, 1024), (997, 997), (300, 1001), (997, 300)])
def test_causal_queries_have_no_tile_above_the_diagonal(Sq, Sk, descriptors):
    tiles, stride = Tiles(32, 64, 32, 1, 1, raster=3), 4
    columns = -(-Sk // (tiles.tile_n * stride))
    found = []
    for rectangle in rectangles(Sq, Sk, stride, tiles, descriptors):
        listed = seen_tiles(rectangle, Sq, Sk, stride, tiles, torch.device("cpu"))
        assert listed.dtype == torch.int32
        found += listed.tolist()
    expected = []
    for m in range(-(-Sq // (tiles.tile_m * stride))):
        last_key = min((m + 1) * tiles.tile_m * stride, Sq) - 1 + Sk - Sq
        seen = [n for n in range(columns) if n * tiles.tile_n * stride <= last_key]
        expected += [m * columns + n for n in seen]
    assert sorted(found) == expected


def test_tiles_come_a_few_rows_at_a_time():
    tiles = Tiles(32, 32, 32, 1, 1, raster=2)
    rectangle = Rectangle(0, 3, 0, 3, True)
    listed = seen_tiles(rectangle, 384, 384, 4, tiles, torch.device("cpu"))
    assert listed.tolist() == [0, 3, 4, 6, 7, 8]


@pytest.mark.parametrize("num_heads", [1, 2])
def test_a_few_heads_at_a_time(num_heads, monkeypatch, device):
    query, key = make_pair(1, 3, 130, 130, 64, device)
    expected = scores_of(query, key, block_size=64)
    # 64 rows of 8 sums of 4 bytes for each head.
    monkeypatch.setattr(kernel, "_SCRATCH_BYTES", num_heads * 64 * 8 * 4)
    assert torch.equal(scores_of(query, key, block_size=64), expected)


def test_tensors_that_tma_cannot_load(device):
    """An address or a stride that is no multiple of 16 bytes."""
    storage = torch.randn(1, 1, 130, 67, device=device)
    for tensor in (storage[..., :64], storage.flatten()[3:][: 130 * 64].view(1, 1, 130, 64)):
        assert not fits_descriptor(tensor)
        aligned = tensor.clone(memory_format=torch.contiguous_format)
        assert torch.equal(
            scores_of(tensor, tensor, block_size=64), scores_of(aligned, aligned, block_size=64)
        )


def test_a_valid_block_is_never_zero(device):
    query, key = make_pair(1, 1, 256, 300, 64, device)
    scores = scores_of(query * 100, key * 100, block_size=64, stride=64)
    assert scores.min() == torch.finfo(torch.float32).tiny


def test_padding_is_not_read(device):
    query, key = make_pair(2, 1, 300, 300, 64, device)
    lengths = make_lengths([300, 131], device)
    expected = scores_of(query, key, block_size=64, key_lengths=lengths)
    key[1, :, 131:] = torch.nan
    actual = scores_of(query, key, block_size=64, key_lengths=lengths)
    assert torch.equal(actual, expected)
    assert (actual[1, :, :, 3:] == 0).all()


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_finite_stays_in_its_row(bad, device):
    query, key = make_pair(1, 1, 300, 300, 64, device)
    expected = scores_of(query, key, block_size=64)
    query[0, 0, 70] = bad
    actual = scores_of(query, key, block_size=64)
    assert actual[0, 0, 1].isnan().all()
    others = [0, 2, 3, 4]
    assert torch.equal(actual[0, 0, others], expected[0, 0, others])


@pytest.mark.parametrize("scale", [0.0, -0.3, 0.7])
def test_any_scale(scale, device):
    query, key = make_pair(1, 1, 130, 200, 64, device)
    assert_is_the_formula(query, key, block_size=64, scale=scale)


def test_a_last_dimension_that_is_not_dense(device):
    query, key = make_pair(1, 1, 130, 200, 64, device)
    scattered = key.transpose(2, 3).contiguous().transpose(2, 3)
    expected = scores_of(query, key, block_size=64)
    assert torch.equal(scores_of(query, scattered, block_size=64), expected)


def test_offsets_beyond_32_bits(device):
    tokens, stride = 65, 2**25
    # 4 GiB, of which only the pages that hold a token are ever touched.
    storage = torch.UntypedStorage(2 * tokens * stride, device=device)
    key = torch.tensor([], dtype=torch.float16, device=device)
    key.set_(storage, 0, (1, 1, tokens, 64), (1, 1, stride, 1))
    key.copy_(torch.randn(1, 1, tokens, 64))
    query = torch.randn(1, 1, tokens, 64, device=device).half()
    expected = scores_of(query, key.contiguous(), block_size=64)
    assert torch.equal(scores_of(query, key, block_size=64), expected)
    assert torch.equal(
        scores_of(key, query, block_size=64), scores_of(key.contiguous(), query, block_size=64)
    )


@pytest.mark.parametrize("stride", [0, 12, 24, 256])
def test_a_stride_that_does_not_fit_is_refused(stride, device):
    (reason,) = unsupported_reasons(device, torch.float32, 64, 128, stride)
    assert reason == (
        "stride must be a power of two that divides block_size, got "
        f"stride={stride}, block_size=128; use 4, 8 or 16."
    )


def test_eight_bits_need_a_recent_gpu(monkeypatch):
    monkeypatch.setattr(support, "INTERPRETING", False)
    monkeypatch.setattr(kernel, "INTERPRETING", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    inputs = (torch.device("cuda", 0), torch.bfloat16, 128, 128, 8)
    assert unsupported_reasons(*inputs) == []
    assert unsupported_reasons(*inputs, float8=True) == [
        "8-bit products need compute capability 8.9 or more, cuda:0 has 8.6; score exactly."
    ]


def test_all_reasons_are_given_at_once(monkeypatch):
    monkeypatch.setattr(support, "INTERPRETING", False)
    monkeypatch.setattr(support, "is_installed", lambda name: False)
    reasons = unsupported_reasons(torch.device("cpu"), torch.float64, 24, 96, 12)
    assert [reason.split(",")[0].split(";")[0].split(" that")[0] for reason in reasons] == [
        "triton is not installed",
        "the device must be CUDA",
        "dtype must be float32",
        "head_dim must be a multiple of 16 from 16 to 256",
        "block_size must be 64 or 128",
        "stride must be a power of two",
    ]


def test_the_interpreter_refuses_bfloat16(monkeypatch):
    monkeypatch.setattr(support, "INTERPRETING", True)
    (reason,) = unsupported_reasons(torch.device("cpu"), torch.bfloat16, 64, 128, 8)
    assert reason.startswith("Triton's interpreter computes bfloat16 wrongly; use float32")


def test_nothing_to_refuse(device):
    assert unsupported_reasons(device, torch.float16, 80, 64, 4) == []
