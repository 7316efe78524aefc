"""A benchmark run whose videos are shared by pairs of ranks."""

import pytest
from launched import launch
from vbench_runs import SMALL, SPARSE, files_of, make_run

from eval_vbench.generate import run
from eval_vbench.launch import launched_share


def test_pairs_of_ranks_make_the_videos_that_one_process_makes(tiny_pipeline, tmp_path):
    alone = tmp_path / "alone"
    code, _, messages = make_run(alone, tiny_pipeline, *SPARSE)
    assert code == 0, messages
    words = ["--run=pairs", f"--model={tiny_pipeline}", "--num-prompts=2", *SMALL, *SPARSE]
    ended = launch([*words, "--gpus-per-video=2"], 4, tmp_path, entry=run)
    assert [end.code for end in ended] == [0] * 4, ended[0].err
    assert files_of(tmp_path / "pairs") == files_of(alone)
    (tmp_path / "pairs/items/0000-0.json").unlink()
    ended = launch([*words, "--gpus-per-video=2"], 4, tmp_path, entry=run)
    assert [end.code for end in ended] == [0] * 4, ended[0].err
    assert files_of(tmp_path / "pairs") == files_of(alone)


def test_groups_that_do_not_fill_the_job_are_refused(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(ValueError, match="number of processes, got 3 with 4; start it with torch"):
        launched_share(3)


def test_neighbours_have_one_share(monkeypatch):
    for name, value in (("RANK", 5), ("WORLD_SIZE", 8), ("LOCAL_RANK", 1)):
        monkeypatch.setenv(name, str(value))
    share = launched_share(2)
    assert (share.rank, share.num_ranks, share.local_rank) == (2, 4, 1)
