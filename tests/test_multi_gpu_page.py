"""The Python of docs/multi_gpu.md runs as it stands, on two ranks that share one video."""

import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from diffusers import HunyuanVideoPipeline
from launched import launch
from page_code import HUB_ID, blocks_of, replace_hub

PAGE = Path(__file__).parents[1] / "docs/multi_gpu.md"


def run_page() -> None:
    """Both snippets on this rank; the second, which places no model, on a pipeline of its own."""
    init = dist.init_process_group
    generator = torch.Generator
    with pytest.MonkeyPatch.context() as patch:
        replace_hub(Path(sys.argv[1]), patch)
        # A CPU in the place of each GPU.
        patch.setattr(torch.cuda, "set_device", lambda number: None)
        patch.setattr(torch.accelerator, "device_count", lambda: 1)
        patch.setattr(HunyuanVideoPipeline, "to", lambda pipe, device: pipe)
        patch.setattr(torch, "Generator", lambda device: generator())
        patch.setattr(dist, "init_process_group", lambda backend: init("gloo"))
        patch.setattr(dist, "destroy_process_group", lambda: None)
        first, second = blocks_of("python", PAGE)
        names: dict = {}
        exec(compile(first, "first", "exec"), names)
        pipe = HunyuanVideoPipeline.from_pretrained(HUB_ID, dtype=torch.bfloat16)
        again = {"pipe": pipe}
        exec(compile(second, "second", "exec"), again)
        video = pipe("a cat walks on the grass", generator=torch.Generator("cuda").manual_seed(0))
        assert [*video.frames[0]] == [*names["video"]]
    dist.destroy_process_group()


def test_its_snippets_run_on_two_ranks_and_agree(tiny_pipeline, tmp_path):
    first, second = launch([tiny_pipeline], 2, tmp_path, seconds=200, entry=run_page)
    assert (first.code, second.code) == (0, 0), first.err + second.err
    assert first.out.startswith("3/8 steps x 3/3 layers sparse")
    assert not second.out
    assert (tmp_path / "cat.mp4").stat().st_size
