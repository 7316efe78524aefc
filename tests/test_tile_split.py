"""Ranks decode the tiles of a video together: the same pixels as one process."""

import pytest
import torch
from diffusers import AutoencoderKLHunyuanVideo
from hunyuan import TINY_PIPELINE
from ranks import run_ranks

from xattn_video.processors import tile_split

# Frames, rows and columns of latents; whether tiles are cut in space too.
SIZES = {
    "tiled": ((5, 10, 14), True),
    "in time alone": ((9, 4, 6), False),
    "whole": ((2, 4, 4), False),
}


def tiny_vae():
    torch.manual_seed(0)
    vae = AutoencoderKLHunyuanVideo(**TINY_PIPELINE.vae).eval().requires_grad_(False)
    vae.tile_sample_min_height = vae.tile_sample_min_width = 32
    vae.tile_sample_stride_height = vae.tile_sample_stride_width = 24
    return vae


class Pipe:
    def __init__(self):
        self.vae = tiny_vae()


def decode_all():
    found = {}
    for name, (size, tiled) in SIZES.items():
        pipe = Pipe()
        if tiled:
            pipe.vae.enable_tiling(32, 32, 16, 24, 24, 12)
        latents = torch.randn(1, 4, *size, generator=torch.Generator().manual_seed(1))
        expected = pipe.vae.decode(latents, return_dict=False)[0]
        tile_split.enable_tile_split(pipe)
        counts = []
        pipe.vae.decoder.conv_in.register_forward_hook(lambda *_, c=counts: c.append(1))
        with tile_split.tile_split(pipe.vae):
            shared = pipe.vae.decode(latents, return_dict=False)[0]
        num_own = len(counts)
        again = pipe.vae.decode(latents, return_dict=False)[0]
        found[name] = {
            "equal": torch.equal(shared, expected) and torch.equal(again, expected),
            "own": num_own,
            "all": len(counts) - num_own,
        }
    return found


@pytest.fixture(scope="module")
def three_ranks(tmp_path_factory):
    return run_ranks(decode_all, 3, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("name", SIZES)
def test_ranks_decode_the_same_pixels(name, three_ranks):
    assert all(rank[name]["equal"] for rank in three_ranks)


def test_every_tile_is_decoded_once(three_ranks):
    for name in SIZES:
        owns = [rank[name]["own"] for rank in three_ranks]
        assert sum(owns) == three_ranks[0][name]["all"]
        assert max(owns) - min(owns) <= 1 + owns[0] // 4
    assert three_ranks[0]["tiled"]["all"] > 12


@pytest.mark.parametrize("frames", [1, 3])
def test_the_room_for_anothers_tile_has_the_size_of_its_pixels(frames):
    vae, tile = tiny_vae(), torch.randn(1, 4, frames, 3, 4)
    assert tile_split._decoded_shape(vae, tile) == vae.decoder(tile).shape


def test_equal_tiles_are_dealt_out_evenly():
    owners = tile_split._owners([5] * 308, 8)
    assert sorted({owners.count(rank) for rank in range(8)}) == [38, 39]
