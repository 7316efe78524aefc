import pytest
import torch
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.normalization import RMSNorm
from oracle import assert_within_budget

pytest.importorskip("triton")

from xattn_video.kernels.qk_norm_rope import qk_norm_rope

pytestmark = pytest.mark.usefixtures("poisoned_memory")

EPS = 1e-6
BFLOAT16 = pytest.param(torch.bfloat16, marks=pytest.mark.gpu)


def make_inputs(B, num_video, num_text, H, D, dtype, device, num_parts=2):
    """Projections of video and text, weights of the norms, cosines and sines."""

    def normal(*shape, dtype=dtype):
        return torch.randn(*shape, device=device).to(dtype)

    video = [normal(B, num_video, H, D) * 3 for _ in range(num_parts)]
    text = [normal(B, num_text, H, D) * 3 for _ in range(num_parts)]
    weights = [normal(D) for _ in range(4)]
    angles = torch.randn(num_video, D, device=device)
    return video, text, weights, (angles.cos(), angles.sin())


def diffusers_joint(video, text, weights, rotary_emb, dtype, eps=EPS):
    """Queries and keys as Diffusers computes them in ``dtype``."""

    def normalised(rows, weight):
        norm = RMSNorm(rows.shape[-1], eps).to(rows.device, dtype)
        norm.weight.data.copy_(weight)
        return norm(rows.to(dtype))

    with torch.no_grad():
        return [
            torch.cat(
                [
                    apply_rotary_emb(normalised(a, w), rotary_emb, sequence_dim=1),
                    normalised(b, v),
                ],
                dim=1,
            )
            for a, b, w, v in zip(video[:2], text[:2], weights[:2], weights[2:], strict=True)
        ]


def formula_joint(video, text, weights, rotary_emb, eps=EPS):
    """Queries and keys by the formula in float64."""

    def normalised(rows, weight):
        rows = rows.double()
        return rows / (rows.square().mean(-1, keepdim=True) + eps).sqrt() * weight.double()

    cos, sin = (part.double()[None, :, None] for part in rotary_emb)
    joint = []
    for a, b, w, v in zip(video[:2], text[:2], weights[:2], weights[2:], strict=True):
        rows = normalised(a, w)
        turned = torch.empty_like(rows)
        turned[..., 0::2], turned[..., 1::2] = -rows[..., 1::2], rows[..., 0::2]
        joint.append(torch.cat([rows * cos + turned * sin, normalised(b, v)], dim=1))
    return joint


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, BFLOAT16])
@pytest.mark.parametrize(
    ("B", "num_video", "num_text", "H", "D"),
    [
        pytest.param(1, 64, 64, 1, 64, id="whole tiles"),
        pytest.param(2, 65, 1, 3, 128, id="one token over"),
        pytest.param(1, 63, 127, 2, 16, id="one short"),
        pytest.param(2, 1, 65, 1, 80, id="one video token"),
        pytest.param(1, 997, 17, 2, 256, id="prime"),
        pytest.param(1, 20, 5, 24, 48, id="many heads"),
    ],
)
def test_it_is_no_further_from_the_formula_than_diffusers(
    B, num_video, num_text, H, D, dtype, device
):
    inputs = make_inputs(B, num_video, num_text, H, D, dtype, device)
    found = qk_norm_rope(*inputs, EPS)
    in_dtype = diffusers_joint(*inputs, dtype)
    for actual, expected, same_dtype in zip(found, formula_joint(*inputs), in_dtype, strict=True):
        assert actual.dtype == dtype
        assert actual.is_contiguous()
        assert_within_budget(actual, expected.cpu(), same_dtype)
        if dtype != torch.float32:
            # It rounds where Diffusers does: nearly every element is the very same.
            assert (actual == same_dtype).float().mean() > 0.98
            error, budget = ((t.double() - expected).norm() for t in (actual, same_dtype))
            assert error <= 1.01 * budget


def test_values_are_joined_as_they_are(device):
    video, text, weights, rotary_emb = make_inputs(2, 65, 17, 3, 64, torch.float16, device, 3)
    found = qk_norm_rope(video, text, weights, rotary_emb, EPS)
    without = qk_norm_rope(video[:2], text[:2], weights, rotary_emb, EPS)
    assert torch.equal(found[2], torch.cat([video[2], text[2]], dim=1))
    assert all(torch.equal(a, b) for a, b in zip(found[:2], without, strict=True))


def test_tokens_go_to_their_places(device):
    video, text, weights, rotary_emb = make_inputs(2, 65, 17, 3, 64, torch.float16, device, 3)
    places = torch.randperm(65 + 17, device=device)
    expected = qk_norm_rope(video, text, weights, rotary_emb, EPS)
    found = qk_norm_rope(video, text, weights, rotary_emb, EPS, places)
    assert all(torch.equal(a[:, places], b) for a, b in zip(found, expected, strict=True))


def test_slices_of_joint_tensors(device):
    """What a single-stream block gives: video and text in one tensor, one pair of norms."""
    video, text, weights, rotary_emb = make_inputs(2, 65, 17, 3, 64, torch.float32, device)
    weights = weights[:2] * 2
    expected = qk_norm_rope(video, text, weights, rotary_emb, EPS)
    joint = [torch.cat(parts, dim=1) for parts in zip(video, text, strict=True)]
    slices = [part[:, :65] for part in joint], [part[:, 65:] for part in joint]
    found = qk_norm_rope(*slices, weights, rotary_emb, EPS)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("order", [(0, 2, 1, 3), (0, 1, 3, 2), (3, 2, 1, 0)])
def test_any_strides(order, device):
    inputs = make_inputs(2, 33, 9, 3, 32, torch.float32, device, 3)
    expected = qk_norm_rope(*inputs, EPS)
    inverse = [order.index(axis) for axis in range(4)]
    video, text = (list(parts) for parts in inputs[:2])
    # Queries alone, so that they and the keys differ.
    video[0] = video[0].permute(order).contiguous().permute(inverse)
    text[0] = text[0].permute(order).contiguous().permute(inverse)
    found = qk_norm_rope(video, text, *inputs[2:], EPS)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_rows_of_zeros_and_eps(device):
    inputs = make_inputs(1, 5, 3, 1, 16, torch.float32, device)
    inputs[0][0][:] = 0
    inputs[1][1] *= 1e-3
    found = qk_norm_rope(*inputs, 1e-2)
    expected = diffusers_joint(*inputs, torch.float32, 1e-2)
    for actual, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(actual, wanted)


def test_what_is_not_finite_stays_in_its_row(device):
    inputs = make_inputs(1, 20, 5, 2, 16, torch.float32, device)
    expected = qk_norm_rope(*inputs, EPS)
    inputs[0][0][0, 7, 1, 3] = torch.nan
    found = qk_norm_rope(*inputs, EPS)
    assert found[0][0, 7, 1].isnan().all()
    found[0][0, 7, 1] = expected[0][0, 7, 1]
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_offsets_beyond_32_bits(device):
    stride = 2**26
    inputs = make_inputs(1, 33, 2, 1, 32, torch.float16, device)
    expected = qk_norm_rope(*inputs, EPS)
    # 4 GiB, of which only the pages that hold a token are ever touched.
    storage = torch.UntypedStorage(2 * 33 * stride, device=device)
    query = torch.tensor([], dtype=torch.float16, device=device)
    query.set_(storage, 0, (1, 33, 1, 32), (33 * stride, stride, 32, 1))
    query.copy_(inputs[0][0])
    # Queries stand in for keys: they have to share their strides, or would be copied.
    found = qk_norm_rope([query, query], *inputs[1:], EPS)
    assert torch.equal(found[0], expected[0])
