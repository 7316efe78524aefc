"""The Hilbert order of the video tokens, and attention in any order."""

import pytest
import torch
from hunyuan import run, with_processor

from xattn_video.ops.token_order import hilbert_order
from xattn_video.processors.layout import TokenLayout

HILBERT = {"token_order": "hilbert"}


@pytest.mark.parametrize("grid", [(1, 1, 1), (3, 5, 2), (17, 16, 16), (5, 1, 9), (6, 4)])
def test_every_cell_comes_once(grid):
    cells = torch.Size(grid).numel()
    assert torch.equal(hilbert_order(grid).sort().values, torch.arange(cells))


@pytest.mark.parametrize("grid", [(2, 2, 2), (8, 8, 8), (16, 16)])
def test_neighbours_on_the_curve_are_neighbours_in_a_cube(grid):
    places = torch.stack(torch.unravel_index(hilbert_order(grid), grid), dim=1)
    assert (places.diff(dim=0).abs().sum(dim=1) == 1).all()


def test_a_block_is_more_compact_than_in_raster_order():
    grid = (33, 45, 80)
    cells = torch.arange(33 * 45 * 80)

    def mean_extent(order):
        places = torch.stack(torch.unravel_index(order, grid), dim=1)
        blocks = places[: len(order) // 128 * 128].view(-1, 128, 3).float()
        return blocks.std(dim=1).norm(dim=1).mean()

    assert mean_extent(hilbert_order(grid)) < mean_extent(cells) / 5


def test_text_stays_last_and_text_first_comes_to_the_end():
    layout = TokenLayout(12, 2, (2,), torch.device("cpu"), grid=(3, 2, 2))
    order = layout.along_hilbert_curve().permutation
    assert torch.equal(order[:12], hilbert_order((3, 2, 2)))
    assert order[12:].tolist() == [12, 13]
    first = TokenLayout.text_first(12, 2, 1, torch.device("cpu"))
    with pytest.raises(ValueError, match="form a grid of frames, rows and columns"):
        first.along_hilbert_curve()


@pytest.mark.parametrize("options", [{}, {"lengths": (10, 3)}, {"lengths": (0,)}], ids=str)
def test_all_blocks_in_hilbert_order_are_dense_attention(options):
    """A density of 0.99 keeps all of 8 blocks, and the layers run sparse."""
    dense, _ = with_processor(1.0)
    sparse, processor = with_processor(None, density=0.99, **HILBERT)
    torch.testing.assert_close(run(sparse, **options), run(dense, **options))
    assert processor.report().density == 1


def test_another_order_computes_other_blocks():
    raster, _ = with_processor(None, density=0.5)
    hilbert, _ = with_processor(None, density=0.5, **HILBERT)
    assert not torch.allclose(run(raster), run(hilbert))


def test_dense_steps_reorder_nothing(monkeypatch):
    monkeypatch.setattr(TokenLayout, "along_hilbert_curve", None)
    model, _ = with_processor(None, density=0.5, warmup_steps=1, **HILBERT)
    run(model)
