"""How ranks share the work, and what is refused before anything is loaded."""

import pytest
import torch

from xattn_video.pipelines.job_ranks import JobRanks
from xattn_video.pipelines.loading import LoadOptions
from xattn_video.pipelines.request import VideoSettings
from xattn_video.pipelines.work_split import WorkSplit, choose_split

PLAIN, GUIDED = VideoSettings(), VideoSettings(true_cfg_scale=6.0)
HUNYUAN = "hunyuanvideo-community/HunyuanVideo"


@pytest.mark.parametrize(
    ("asked", "num_ranks", "video", "num_prompts", "split"),
    [
        ("auto", 1, GUIDED, 3, WorkSplit()),
        ("auto", 2, PLAIN, None, WorkSplit(2)),
        ("auto", 2, PLAIN, 1, WorkSplit(2)),
        ("auto", 2, GUIDED, 2, WorkSplit(2, by_prompt=True)),
        ("auto", 2, GUIDED, None, WorkSplit(2, by_pass=True)),
        ("auto", 8, GUIDED, 1, WorkSplit(8, by_pass=True)),
        ("auto", 3, GUIDED, None, WorkSplit(3)),
        ("ulysses", 2, GUIDED, 9, WorkSplit(2)),
        ("prompts", 5, PLAIN, 2, WorkSplit(5, by_prompt=True)),
    ],
)
def test_the_way_to_share(asked, num_ranks, video, num_prompts, split):
    assert choose_split(asked, num_ranks, HUNYUAN, video, num_prompts) == split


def test_ranks_for_a_video_and_for_a_pass():
    split = WorkSplit(8, by_pass=True)
    assert (split.ranks_per_video, split.ranks_per_pass) == (8, 4)
    assert WorkSplit(8, by_prompt=True).ranks_per_video == 1


@pytest.mark.parametrize(
    ("asked", "num_ranks", "video", "num_prompts", "message"),
    [
        ("ring", 2, PLAIN, None, r"must be one of auto, ulysses, cfg, prompts, got 'ring'"),
        ("ulysses", 1, PLAIN, None, r"got one; start with torchrun --nproc-per-node N"),
        ("prompts", 2, PLAIN, None, r"give it, or use --parallel ulysses"),
        ("cfg", 2, PLAIN, None, r"needs true_cfg_scale above 1 and an even number of ranks"),
        ("cfg", 3, GUIDED, None, r"an even number of ranks"),
        (
            "auto",
            5,
            PLAIN,
            None,
            r"24 heads cannot be divided evenly among 5 ranks; use 2, 3, 4, " r"6, 8, 12,",
        ),
        ("cfg", 10, GUIDED, None, r"among 5 ranks; use 4, 6, 8, 12, 16, 24, 48 ranks"),
    ],
)
def test_what_cannot_be_shared_is_refused(asked, num_ranks, video, num_prompts, message):
    with pytest.raises(ValueError, match=message):
        choose_split(asked, num_ranks, HUNYUAN, video, num_prompts)


@pytest.fixture
def two_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: True)


@pytest.mark.usefixtures("two_gpus")
def test_every_rank_has_its_gpu_and_its_part_of_the_host():
    load = JobRanks(3, 4, 1, 2).place(LoadOptions())
    assert (load.device, load.processes) == ("cuda:1", 2)


@pytest.mark.usefixtures("two_gpus")
def test_more_ranks_than_gpus_are_refused():
    with pytest.raises(ValueError, match=r"got 4 ranks and 2 GPU\(s\).*--nproc-per-node 2\."):
        JobRanks(0, 4, 0, 4).place(LoadOptions())


@pytest.mark.usefixtures("two_gpus")
def test_one_gpu_for_all_ranks_is_refused():
    with pytest.raises(ValueError, match=r"got device 'cuda:1' for all 2 ranks; use cuda\."):
        JobRanks(0, 2, 0, 2).place(LoadOptions(device="cuda:1"))


@pytest.mark.usefixtures("two_gpus")
def test_a_torch_without_nccl_is_refused(monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: False)
    with pytest.raises(ValueError, match="communicate through NCCL, which this torch does not"):
        JobRanks(0, 2, 0, 2).place(LoadOptions())
