import pytest
import torch
from oracle import make_lengths

pytest.importorskip("triton")

from xattn_video.kernels.largest_norms import largest_norms

pytestmark = pytest.mark.usefixtures("poisoned_memory")


@pytest.mark.parametrize("S", [1, 64, 333])
@pytest.mark.parametrize("D", [80, 128])
def test_norm_of_the_longest_valid_token(S, D, device):
    tokens = torch.randn(2, S, 3, D, device=device).transpose(1, 2)
    lengths = make_lengths([S, S - S // 3], device)
    tokens[1, :, S - S // 3 :] = torch.nan
    expected = [tokens[0].norm(dim=-1).amax(-1), tokens[1, :, : S - S // 3].norm(dim=-1).amax(-1)]
    torch.testing.assert_close(largest_norms(tokens, lengths), torch.stack(expected))


def test_without_lengths_every_token_counts(device):
    tokens = torch.randn(1, 2, 100, 64, device=device)
    tokens[0, 1, 99] = 100.0
    expected = tokens.norm(dim=-1).amax(dim=-1)
    torch.testing.assert_close(largest_norms(tokens, None), expected)
