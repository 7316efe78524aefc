"""Scoring a run: what is checked before, during and after; VBench itself is a stand-in."""

import importlib
import json
import os
import shutil
import sys

import pytest
from fake_vbench import install_fake_vbench
from vbench_runs import invoke, make_run

from eval_vbench import score, setup_vbench
from eval_vbench.preflight import NEEDS
from eval_vbench.run_folder import RunFolder
from eval_vbench.score_files import read_scores


@pytest.fixture(scope="module")
def made(tiny_pipeline, tmp_path_factory):
    """A run of two prompts; tests leave it as it is."""
    folder = tmp_path_factory.mktemp("made") / "run"
    assert make_run(folder, tiny_pipeline, "--dense")[0] == 0
    return folder


@pytest.fixture
def run(made, tmp_path):
    """A copy that a test may change."""
    shutil.copytree(made, tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture
def weights(tmp_path):
    """A folder with something in every file that VBench needs."""
    folder = tmp_path / "weights"
    for needs in NEEDS.values():
        for entry in needs.weights:
            path = folder / entry.path
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.suffix:
                path.write_text("x")
            else:
                (path / "0").mkdir(parents=True, exist_ok=True)
    return folder


def score_run(run, *arguments, python=sys.executable):
    """Exit code, stdout, stderr."""
    return invoke(score.app, f"--run={run}", f"--vbench-python={python}", *arguments)


def test_every_dimension_is_scored(run, fake_vbench, weights):
    code, table, messages = score_run(run, f"--weights={weights}")
    assert code == 0, messages
    assert "temporal_flickering     0.9000  2 videos" in table
    scores = read_scores(RunFolder(run))
    assert len(scores) == 8
    assert set(scores["imaging_quality"].videos.values()) == {0.6}
    assert set(scores["dynamic_degree"].videos.values()) == {1.0}
    names = {item.file_name for item in RunFolder(run).expected_items()}
    assert set(scores["temporal_flickering"].videos) == names


def test_what_was_scored_is_not_scored_again(run, fake_vbench, weights, monkeypatch):
    arguments = (f"--weights={weights}", "--dimensions=temporal_flickering,dynamic_degree")
    assert score_run(run, *arguments)[0] == 0
    monkeypatch.setenv("FAKE_VBENCH", "raise")
    code, table, _ = score_run(run, *arguments)
    assert code == 0
    assert "temporal_flickering     scored already" in table
    assert not list(run.glob("scores/*.tmp"))


def test_a_dimension_that_fails_does_not_stop_the_rest(run, fake_vbench, weights, monkeypatch):
    place = f"--weights={weights}"
    both = "--dimensions=temporal_flickering,motion_smoothness"
    assert score_run(run, place, "--dimensions=dynamic_degree")[0] == 0
    monkeypatch.setenv("FAKE_VBENCH", "raise")
    code, _, messages = score_run(run, place, both)
    assert code == 1
    assert (
        "failed: temporal_flickering: VBench failed: RuntimeError: the checkpoint does not fit; "
        f"see {run / 'scores/temporal_flickering.log'}" in messages
    )
    assert "failed: motion_smoothness: " in messages
    assert "2 of 2 dimensions failed, as listed above; the others are kept" in messages
    assert list(read_scores(RunFolder(run))) == ["dynamic_degree"]
    monkeypatch.delenv("FAKE_VBENCH")
    assert score_run(run, place, both)[0] == 0
    assert len(read_scores(RunFolder(run))) == 3


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("nan", "VBench scored 0 of 2 videos; missing are 'a "),
        ("drop", "VBench scored 1 of 2 videos; missing are 'a "),
        ("nan video", "is not finite."),
        ("killed", "VBench was killed by signal 9: no message; see"),
        ("silent", "VBench wrote no result; see"),
        ("cut", "is cut short; free space there, and see"),
    ],
)
def test_what_is_no_score_is_refused(run, fake_vbench, wrong, message, monkeypatch):
    monkeypatch.setenv("FAKE_VBENCH", wrong)
    code, _, messages = score_run(run, "--dimensions=temporal_flickering")
    assert code == 1
    assert "failed: temporal_flickering: " in messages
    assert message in messages
    assert read_scores(RunFolder(run)) == {}


def test_what_is_missing_is_listed_before_any_work(run, fake_vbench, tmp_path):
    (fake_vbench / "clip.py").unlink()
    weights = tmp_path / "none"
    empty = weights / "clip_model/ViT-B-32.pt"
    empty.parent.mkdir(parents=True)
    empty.touch()
    code, table, messages = score_run(run, f"--weights={weights}")
    assert code == 2
    assert "temporal_flickering     ready" in table
    assert (
        "background_consistency  lacks 2\n"
        "    module clip\n"
        f"        to    {sys.executable}\n"
        "        from  pip install openai-clip\n"
        "    ViT-B-32.pt\n"
        f"        to    {empty}\n"
        "        from  https://openaipublic.azureedge.net/clip/models/" in table
    )
    assert "7 of 8 dimensions cannot be scored, see above; add what is missing" in messages
    assert not (run / "scores").exists()


def test_skip_missing_scores_the_rest(run, fake_vbench, tmp_path):
    code, table, _ = score_run(run, f"--weights={tmp_path / 'none'}", "--skip-missing")
    assert code == 0
    assert "temporal_flickering     0.9000  2 videos" in table
    assert list(read_scores(RunFolder(run))) == ["temporal_flickering"]


def test_a_stray_file_is_refused(run, fake_vbench):
    (run / "videos/manifest.json").touch()
    code, _, messages = score_run(run)
    assert code == 2
    assert "holds 1 files that are not videos of this run: 'manifest.json'; move them" in messages


def test_a_missing_video_is_refused(run, fake_vbench):
    lost = min((run / "videos").iterdir())
    lost.unlink()
    code, _, messages = score_run(run)
    assert code == 2
    assert f"1 of 2 videos are missing or changed: {lost.name!r}; run eval_vbench" in messages


def test_a_truncated_video_is_refused(run, fake_vbench):
    short = min((run / "videos").iterdir())
    short.write_bytes(short.read_bytes()[:-10])
    code, _, messages = score_run(run)
    assert code == 2
    assert f"1 of 2 videos are missing or changed: {short.name!r}" in messages


def test_a_broken_video_is_refused(run, fake_vbench, tiny_pipeline):
    broken = min((run / "videos").iterdir())
    content = bytearray(broken.read_bytes())
    content[-20:] = bytes(20)
    broken.write_bytes(content)
    code, _, messages = score_run(run)
    assert (code, "1 of 2 videos are missing or changed: " in messages) == (2, True)
    # As if it were restored with an old date.
    os.utime(broken, (0, 0))
    code, _, messages = score_run(run)
    assert code == 2
    assert (
        "1 of 2 videos have changed since they were "
        f"generated: {broken.name!r}; remove them" in messages
    )
    broken.unlink()
    assert make_run(run, tiny_pipeline, "--dense")[0] == 0
    assert score_run(run, "--dimensions=temporal_flickering")[0] == 0


def test_an_environment_without_vbench_is_refused(run, monkeypatch, tmp_path):
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    code, _, messages = score_run(run)
    assert code == 2
    assert "has no vbench, expected 0.1.5; make it with python -m eval_vbench.setup" in messages


def test_another_vbench_is_refused(run, monkeypatch, tmp_path):
    install_fake_vbench(tmp_path / "packages", "0.2.0")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "packages"))
    code, _, messages = score_run(run)
    assert code == 2
    assert "has vbench 0.2.0, expected 0.1.5" in messages


@pytest.mark.parametrize(
    ("python", "message"),
    [
        ("/nowhere/python", "cannot run '/nowhere/python': No such file or directory"),
        ("/bin/false", "'/bin/false' fails: no message"),
        ("/bin/true", "'/bin/true' is no Python with VBench"),
    ],
)
def test_an_environment_that_cannot_run_is_refused(run, python, message):
    code, _, messages = score_run(run, python=python)
    assert code == 2
    assert message in messages
    assert "give --vbench-python DIR/bin/python" in messages


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ("flicker", "unknown dimension 'flicker'; VBench has subject_consistency, "),
        ("color", "no prompt of this run belongs to color; it can be scored on subject_"),
    ],
)
def test_foreign_dimensions_are_refused(run, names, message):
    code, _, messages = score_run(run, f"--dimensions={names}")
    assert code == 2
    assert message in messages


def test_every_dimension_has_its_needs():
    from eval_vbench.dimensions import dimensions

    assert set(NEEDS) == set(dimensions())
    assert NEEDS["temporal_flickering"].weights == ()


def test_no_environment_is_made_over_another(tmp_path):
    (tmp_path / "file").touch()
    code, _, messages = invoke(setup_vbench.app, tmp_path)
    assert code == 2
    assert "is not empty; remove it, or give another folder" in messages


def test_a_python_that_is_too_new_is_refused(tmp_path):
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho 3 12\n")
    python.chmod(0o755)
    code, _, messages = invoke(setup_vbench.app, tmp_path / "env", f"--python={python}")
    assert code == 2
    assert "is Python 3.12; vbench 0.1.5 needs transformers 4.33.2, which has no" in messages
    assert not (tmp_path / "env").exists()


@pytest.mark.slow
def test_the_real_vbench_scores_temporal_flickering(run, tmp_path, vbench_python):
    """In its own environment; no weights are needed."""
    import imageio.v3 as imageio
    import numpy as np

    arguments = ("--skip-missing", "--device=cpu", f"--weights={tmp_path / 'none'}")
    code, _, messages = score_run(run, *arguments, python=vbench_python)
    assert code == 0, messages
    found = json.loads((run / "scores/temporal_flickering.json").read_text())
    expected = {}
    for path in (run / "videos").iterdir():
        frames = imageio.imread(path).astype(np.float32)
        expected[path.name] = 1 - float(np.abs(np.diff(frames, axis=0)).mean()) / 255
    # Two decoders round the conversion from YUV differently.
    assert found["videos"] == pytest.approx(expected, abs=2e-3)
    assert found["score"] == pytest.approx(np.mean(list(expected.values())), abs=2e-3)


@pytest.mark.parametrize("command", ["generate", "score", "report", "setup_vbench"])
def test_words_that_are_no_option_are_one_line(command):
    app = importlib.import_module(f"eval_vbench.{command}").app
    code, out, err = invoke(app, "--nonsense")
    assert (code, out) == (2, "")
    (line,) = err.splitlines()
    assert line.startswith("error: No such option: --nonsense")
    assert line.endswith("--help.")


@pytest.fixture
def own(made, tmp_path):
    """A folder of one's own videos, with another file among them."""
    folder = tmp_path / "own"
    folder.mkdir()
    for number, video in enumerate((made / "videos").iterdir()):
        shutil.copy(video, folder / f"mine {number}.mp4")
    (folder / "notes.txt").write_text("x")
    return folder


def score_own(folder, *arguments):
    python = f"--vbench-python={sys.executable}"
    return invoke(score.app, f"--videos={folder}", python, *arguments)


def test_ones_own_videos_are_scored_and_not_scored_again(own, fake_vbench, weights, monkeypatch):
    code, table, messages = score_own(own, f"--weights={weights}")
    assert code == 0, messages
    assert "temporal_flickering     0.9000  2 videos" in table
    kept = json.loads((own / "vbench/imaging_quality.json").read_text())
    assert kept["videos"] == {"mine 0.mp4": 0.6, "mine 1.mp4": 0.6}
    assert len(list((own / "vbench").glob("*.json"))) == 10
    monkeypatch.setenv("FAKE_VBENCH", "raise")
    code, out, messages = score_own(own, f"--weights={weights}", "--json")
    assert code == 0, messages
    assert json.loads(out)["scores"]["motion_smoothness"] == {"score": 0.9, "videos": 2}
    (own / "mine 0.mp4").unlink()
    assert score_own(own, f"--weights={weights}", "--dimensions=dynamic_degree")[0] == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "give --run or --videos, or --download to fetch weights; got none."),
        (
            ["--videos=a", "--run=b"],
            "--run and --videos cannot be combined; give only one of them.",
        ),
        (["--videos=/nowhere"], "'/nowhere' is not a folder; give a folder with videos."),
        (
            ["--videos=."],
            "'.' contains no video that VBench accepts; expected files that end in .mp4",
        ),
        (
            ["--videos=/nowhere", "--device=foo"],
            "--device must be cpu, cuda or cuda:N, got 'foo'; use one of these.",
        ),
    ],
)
def test_what_cannot_be_scored_is_one_line(words, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = invoke(score.app, *words)
    assert (code, out) == (2, "")
    assert err.startswith(f"error: {message}")


def test_a_dimension_that_needs_vbenchs_prompts_is_refused(own, fake_vbench):
    code, _, err = score_own(own, "--dimensions=color,dynamic_degree")
    assert code == 2
    assert "error: color need VBench's own prompts; videos without them can be scored on" in err
