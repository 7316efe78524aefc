"""Generating a run: what it writes, how it resumes, what it refuses."""

import errno
import fcntl
import json
import shutil

import imageio.v3 as imageio
import pytest
from vbench_runs import SPARSE, files_of, make_run

from eval_vbench import sampling
from eval_vbench.run_folder import RunFolder
from xattn_video.pipelines import item_folder


@pytest.fixture(scope="module")
def finished(tiny_pipeline, tmp_path_factory):
    """A sparse run of two prompts; tests leave it as it is."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    code, _, messages = make_run(folder, tiny_pipeline, *SPARSE)
    assert code == 0, messages
    return folder


def test_a_run_holds_its_videos_and_what_they_took(finished):
    names = [item.file_name for item in RunFolder(finished).expected_items()]
    assert sorted(path.name for path in (finished / "videos").iterdir()) == sorted(names)
    for item in RunFolder(finished).expected_items():
        record = RunFolder(finished).record(item.key)
        assert record["seed"] == 100 * item.prompt.index
        assert 0 < record["density"] < 1
        assert record["shape"] == [9, 64, 64, 3]
        assert record["flow_shift"] == 7.0
        assert set(record["checks"]) >= {"shape", "motion"}
        assert imageio.imread(finished / "videos" / item.file_name).shape == (9, 64, 64, 3)
        assert imageio.imread(finished / f"lossless/{item.key}.mkv").shape == (9, 64, 64, 3)


def test_a_finished_run_loads_no_model(finished, tiny_pipeline, monkeypatch):
    def refuse(options):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr("xattn_video.pipelines.loading.load_pipeline", refuse)
    code, _, messages = make_run(finished, tiny_pipeline, *SPARSE)
    assert code == 0
    assert "2 of 2 videos already exist" in messages


def test_it_says_how_long_it_will_take(tiny_pipeline, tmp_path):
    code, _, messages = make_run(tmp_path, tiny_pipeline, "--dense")
    assert code == 0
    assert "1/2 videos, " in messages
    assert " s left" in messages


class Killed(BaseException):
    """Nothing in the program catches it, as nothing catches a signal 9."""


@pytest.mark.parametrize(
    ("owner", "part", "before"),
    [
        (sampling, "generate", True),
        (sampling, "write_video", False),
        (RunFolder, "add", True),
        (RunFolder, "add", False),
        (item_folder, "write_json", True),
    ],
    ids=["sampling", "first file written", "all written", "video done", "record not written"],
)
def test_a_run_killed_anywhere_is_resumed(
    owner, part, before, finished, tiny_pipeline, tmp_path, monkeypatch
):
    folder, original, calls = tmp_path / "run", getattr(owner, part), []

    def die(*arguments, **options):
        calls.append(arguments)
        is_last = len(calls) == 2
        if is_last and before:
            raise Killed
        result = original(*arguments, **options)
        if is_last:
            raise Killed
        return result

    with monkeypatch.context() as patch:
        patch.setattr(owner, part, die)
        with pytest.raises(Killed):
            make_run(folder, tiny_pipeline, *SPARSE)
    code, _, messages = make_run(folder, tiny_pipeline, *SPARSE)
    assert code == 0, messages
    assert files_of(folder) == files_of(finished)


def test_a_lost_or_cut_video_is_made_again(finished, tiny_pipeline, tmp_path):
    folder = tmp_path / "run"
    assert make_run(folder, tiny_pipeline, *SPARSE)[0] == 0
    first, second = sorted((folder / "videos").iterdir())
    first.unlink()
    second.write_bytes(second.read_bytes()[:100])
    code, _, messages = make_run(folder, tiny_pipeline, *SPARSE)
    assert code == 0
    assert "0 of 2 videos already exist" in messages
    assert files_of(folder) == files_of(finished)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"{}", b"\xff", b'{"key": "0000-0"}'])
def test_a_video_whose_record_is_broken_is_made_again(content, finished, tiny_pipeline, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    (folder / "items/0000-0.json").write_bytes(content)
    code, _, messages = make_run(folder, tiny_pipeline, *SPARSE)
    assert code == 0, messages
    assert "1 of 2 videos already exist" in messages
    assert files_of(folder) == files_of(finished)
    assert RunFolder(folder).record("0000-0")["prompt"]


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--threshold=0.7", "threshold 0.8 and 0.7"),
        ("--seed=1", "seed 0 and 1"),
        ("--height=80", "height 64 and 80"),
        ("--videos-per-prompt=5", "--videos-per-prompt 1 and 5"),
    ],
)
def test_other_settings_are_refused(finished, tiny_pipeline, option, message):
    before = files_of(finished)
    code, _, messages = make_run(finished, tiny_pipeline, *SPARSE, option)
    assert code == 2
    assert f"holds a run with other settings: {message} (in the folder and requested)" in messages
    assert "give another --run, or the same settings" in messages
    assert files_of(finished) == before


def test_dense_is_another_setting(finished, tiny_pipeline):
    code, _, messages = make_run(finished, tiny_pipeline, "--dense")
    assert code == 2
    assert "holds a run with other settings: sparse {" in messages


def test_changed_settings_are_found(tiny_pipeline, tmp_path):
    run = RunFolder(tmp_path)
    run.adopt({"seed": 0})
    file = tmp_path / "settings.json"
    file.write_text(file.read_text().replace('"seed": 0', '"seed": 1'))
    with pytest.raises(ValueError, match=r"was changed: its hash does not match its settings"):
        run.settings()
    file.write_text("{}")
    with pytest.raises(ValueError, match=r"is not a valid settings file"):
        run.settings()


def test_videos_of_unknown_origin_are_refused(tiny_pipeline, tmp_path):
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos/cat-0.mp4").touch()
    code, _, messages = make_run(tmp_path, tiny_pipeline, "--dense")
    assert code == 2
    assert "so their settings are unknown (such as 'cat-0.mp4'); give an empty folder" in messages
    assert [path.name for path in tmp_path.iterdir()] == ["videos"]


@pytest.mark.parametrize("words", [SPARSE, ["--dense", "--overwrite"]])
def test_two_processes_do_not_share_a_rank(words, finished, tiny_pipeline):
    run = RunFolder(finished)
    before = run.settings(), run.record("0000-0")
    with (finished / "locks/rank-0").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        code, _, messages = make_run(finished, tiny_pipeline, *words)
    assert code == 2
    assert (run.settings(), run.record("0000-0")) == before
    assert "another process is generating into" in messages
    assert "use several GPUs with accelerate launch" in messages


def test_failures_are_listed_and_tried_again(finished, tiny_pipeline, tmp_path, monkeypatch):
    folder, original = tmp_path / "run", sampling.generate

    def fail_first(pipe, request, on_step):
        if request.seed == 0:
            raise RuntimeError("CUDA out of memory")
        return original(pipe, request, on_step)

    with monkeypatch.context() as patch:
        patch.setattr(sampling, "generate", fail_first)
        code, _, messages = make_run(folder, tiny_pipeline, *SPARSE)
    assert code == 1
    run = RunFolder(folder)
    first, second = run.expected_items()
    assert f"failed: {first.file_name}: RuntimeError: CUDA out of memory" in messages
    assert "1 of 2 videos failed, as listed above and in" in messages
    assert run.failure(first.key) == "RuntimeError: CUDA out of memory"
    assert run.record(second.key) is not None
    code, _, messages = make_run(folder, tiny_pipeline, *SPARSE)
    assert code == 0
    assert "1 of 2 videos already exist" in messages
    assert run.failure(first.key) is None
    assert files_of(folder) == files_of(finished)
    # The run ended between a video's record and the removal of its failure.
    run.add_failure(first.key, first.file_name, RuntimeError("CUDA out of memory"))
    assert make_run(folder, tiny_pipeline, *SPARSE)[0] == 0


def test_a_full_disk_stops_the_run(finished, tiny_pipeline, tmp_path, monkeypatch):
    folder, original = tmp_path / "run", sampling.write_video

    def write_or_fill(path, frames, fps):
        if path.name == "0001-0.mp4":
            path.write_bytes(b"part")
            raise OSError(errno.ENOSPC, "No space left on device")
        original(path, frames, fps)

    with monkeypatch.context() as patch:
        patch.setattr(sampling, "write_video", write_or_fill)
        code, _, messages = make_run(folder, tiny_pipeline, *SPARSE)
    assert code == 1
    assert "is full; finished work is kept: free some space, then run the same" in messages
    assert len(list((folder / "videos").iterdir())) == 1
    assert make_run(folder, tiny_pipeline, *SPARSE)[0] == 0
    assert files_of(folder) == files_of(finished)


def test_a_broken_gpu_stops_the_run(tiny_pipeline, tmp_path, monkeypatch):
    def fail(pipe, request, on_step):
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(sampling, "generate", fail)
    code, _, messages = make_run(tmp_path, tiny_pipeline, "--dense", prompts=5)
    assert code == 1
    assert "3 videos failed in a row, the last with RuntimeError: an ill" in messages
    assert len(list((tmp_path / "failures").iterdir())) == 3


def test_failures_that_are_not_in_a_row_stop_no_run(tiny_pipeline, tmp_path, monkeypatch):
    original, calls = sampling.generate, []

    def fail_often(pipe, request, on_step):
        calls.append(request)
        if len(calls) != 3:
            raise RuntimeError("not this one")
        return original(pipe, request, on_step)

    monkeypatch.setattr(sampling, "generate", fail_often)
    code, _, messages = make_run(tmp_path, tiny_pipeline, "--dense", prompts=5)
    assert code == 1
    assert len(calls) == 5
    assert "4 of 5 videos failed" in messages


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (
            "--suite=long",
            "--suite must be one of gpt_enhanced, hunyuan, original, demo",
        ),
        ("--num-prompts=41", "--num-prompts must lie between 1 and 40 for suite 'demo', got 41"),
        ("--videos-per-prompt=3", "--videos-per-prompt must be 1 (a reduced run) or 5"),
        ("--seed=-1", "--seed must lie between 0 and 2**63 - 1, got -1"),
        ("--fps=0", "--fps must lie between 1 and 240, got 0; use 24."),
        ("--threshold=1.5", "--threshold must lie in (0, 1], got 1.5"),
        ("--model=/nowhere", "model '/nowhere' is neither a folder nor a hub ID"),
    ],
)
def test_bad_arguments_touch_nothing(tiny_pipeline, tmp_path, option, message):
    folder = tmp_path / "run"
    code, _, messages = make_run(folder, tiny_pipeline, option)
    assert code == 2
    assert message in messages
    assert not folder.exists()


def test_a_backend_that_is_refused_touches_nothing(tiny_pipeline, tmp_path):
    code, _, messages = make_run(tmp_path / "run", tiny_pipeline, *SPARSE, "--backend=flash4")
    assert (code, list(tmp_path.iterdir())) == (2, []), messages


def test_the_settings_are_readable(finished):
    content = json.loads((finished / "settings.json").read_text())
    assert content["settings"]["sparse"]["threshold"] == 0.8
    assert content["settings"]["sparse"]["scoring_precision"] == "exact"
    assert len(content["hash"]) == 64


def test_a_run_of_other_settings_is_made_anew_where_that_is_asked(
    finished, tiny_pipeline, tmp_path
):
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    code, _, messages = make_run(folder, tiny_pipeline, "--dense")
    assert (code, "holds a run with other settings" in messages) == (2, True)
    code, _, messages = make_run(folder, tiny_pipeline, "--dense", "--overwrite", prompts=1)
    assert code == 0, messages
    assert "0 of 1 videos already exist" in messages
    assert len(list((folder / "videos").iterdir())) == 1
    assert RunFolder(folder).settings()["sparse"] is None


@pytest.mark.usefixtures("no_model")
def test_a_run_is_made_anew_only_by_one_process(monkeypatch, tmp_path):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    code, _, err = make_run(tmp_path / "r", "demo", "--overwrite")
    assert code == 2
    assert "error: --overwrite replaces the run's videos, which other ranks may be" in err
