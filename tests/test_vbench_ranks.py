"""Benchmark runs on several ranks, each with videos of its own or sharing them in pairs."""

import pytest
from launched import launch
from vbench_runs import SMALL, SPARSE, files_of, make_run

from eval_vbench import sampling, sampling_job
from eval_vbench.generate import run
from eval_vbench.launch import launched_share
from eval_vbench.run_folder import RunFolder


@pytest.fixture
def words(tiny_pipeline):
    return ["--run=run", f"--model={tiny_pipeline}", "--num-prompts=2", *SMALL, *SPARSE]


def test_two_ranks_make_the_videos_that_one_process_makes(words, tiny_pipeline, tmp_path):
    code, _, messages = make_run(tmp_path / "alone", tiny_pipeline, *SPARSE)
    assert code == 0, messages
    first, second = launch(words, 2, tmp_path, entry=run)
    assert (first.code, second.code) == (0, 0), first.err
    assert "\n0 of 1 videos already exist\n" in f"\n{first.err}"
    assert "[1] 0 of 1 videos already exist\n" in second.err
    assert files_of(tmp_path / "run") == files_of(tmp_path / "alone")
    (tmp_path / "run/items/0001-0.json").unlink()
    ended = launch(words, 2, tmp_path, entry=run)
    assert [end.code for end in ended] == [0, 0], ended[0].err
    assert files_of(tmp_path / "run") == files_of(tmp_path / "alone")


def refuse(load, requests, force):
    raise ValueError("the memory is too small.")


def rank_zero_refuses(rank):
    if rank == 0:
        sampling_job.check_runs = refuse


def rank_one_refuses(rank):
    if rank == 1:
        sampling_job.check_runs = refuse


@pytest.mark.parametrize("sabotage", [rank_zero_refuses, rank_one_refuses])
def test_what_one_rank_refuses_leaves_nothing_of_any(sabotage, words, tmp_path):
    first, second = launch(words, 2, tmp_path, sabotage, entry=run)
    assert first.code
    assert second.code
    assert first.err.count("the memory is too small.\n") == 1
    assert second.err == ""
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--height=70", "--height must be a positive multiple of 16 pixels, got 70"),
        ("--fps=0", "--fps must lie between 1 and 240, got 0"),
        ("--seed=-1", "--seed must lie between 0 and 2**63 - 1, got -1"),
        ("--attention-backend=no", "unknown attention backend 'no' for the dense steps"),
    ],
)
def test_what_all_ranks_refuse_is_said_once(option, message, words, tmp_path):
    first, second = launch([*words, option], 2, tmp_path, entry=run)
    assert first.err.startswith(f"error: {message}; ")
    assert (first.err.count("\n"), second.err) == (1, "")


def test_other_settings_are_refused_once(words, tmp_path):
    assert [end.code for end in launch(words, 2, tmp_path, entry=run)] == [0, 0]
    first, second = launch([*words, "--seed=1"], 2, tmp_path, entry=run)
    assert first.err.count("error: 'run' holds a run with other settings: seed 0 and 1") == 1
    assert second.err == ""


def second_video_fails(rank):
    def fail(pipe, request, on_step):
        raise RuntimeError("CUDA out of memory")

    if rank == 1:
        sampling.generate = fail


def test_a_failed_video_ends_no_other_rank(words, tmp_path):
    """Its error would make the launcher end them, so it is reported at the end."""
    first, second = launch(words, 2, tmp_path, second_video_fails, entry=run)
    assert first.code == 1
    assert "error: 1 of 2 videos failed, as listed above and in run/failures;" in first.err
    assert "RuntimeError: CUDA out of memory\n" in second.err
    folder = RunFolder(tmp_path / "run")
    made, failed = folder.expected_items()
    assert folder.record(made.key) is not None
    assert folder.failure(failed.key) == "RuntimeError: CUDA out of memory"


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
