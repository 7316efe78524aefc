"""Which rank computes which pass of true guidance; tests of several ranks show the samples."""

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from xattn_video.processors.guidance_split import GuidanceSplit, enable_guidance_split


@pytest.mark.parametrize("rank", [0, 1])
def test_the_pass_that_the_partner_computes_leaves_room_for_its_sample(monkeypatch, rank):
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "get_rank", lambda: rank)
    sample, latents = torch.randn(2, 5, 3, 8, 6), torch.randn(2, 4, 3, 8, 6)
    calls = []

    def real(hidden_states):
        calls.append(hidden_states)
        return (sample,)

    split = GuidanceSplit()
    (found,) = split.forward(real, SimpleNamespace(out_channels=5), hidden_states=latents)
    assert found.shape == sample.shape
    assert len(calls) == (rank == 0)
    assert (found is sample) == (rank == 0)


def test_an_odd_number_of_ranks_cannot_share_guidance(monkeypatch):
    monkeypatch.setattr(dist, "get_world_size", lambda: 3)
    pipe = SimpleNamespace(transformer=SimpleNamespace())
    with pytest.raises(ValueError, match="two groups of ranks share guidance, got 3 ranks"):
        enable_guidance_split(pipe)
    assert vars(pipe.transformer) == {}
