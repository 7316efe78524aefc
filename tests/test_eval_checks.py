"""`eval_language`: what is found before prompts are generated, and tasks that have no room."""

import json

import pytest
from test_eval_language import ruler, run


@pytest.fixture
def no_prompts(harnesses, monkeypatch):
    """Fail the test if prompts are generated, which takes minutes."""

    def refuse(*_):
        raise AssertionError("prompts were generated")

    monkeypatch.setattr(harnesses("lm_eval.tasks").TaskManager, "load", refuse)


def test_other_settings_are_refused_before_prompts(harnesses, tiny_llm, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    assert ruler(folder, tiny_llm, "--settings=0.5:8")[0] == 0
    monkeypatch.setattr(harnesses("lm_eval.tasks").TaskManager, "load", None)
    for words in (["--settings=0.6:8"], ["--settings=0.5:8", "--lengths=1100"]):
        code, _, err = ruler(folder, tiny_llm, *words)
        assert code == 2, err
        assert "holds a run with other settings" in err
        assert err.count("\n") == 1


def test_a_folder_that_cannot_be_written_is_refused_before_prompts(no_prompts, tiny_llm, tmp_path):
    (tmp_path / "file").touch()
    code, _, err = ruler(tmp_path / "file/run", tiny_llm)
    assert code == 2, err
    assert "file' is a file, not a folder" in err
    assert err.count("\n") == 1


def test_lengths_that_are_too_short_are_refused_before_prompts(no_prompts, tiny_llm, tmp_path):
    code, _, err = ruler(tmp_path / "run", tiny_llm, "--lengths=1023")
    assert code == 2, err
    assert "--lengths must be at least 1024, got 1023; use 8192,16384." in err


def test_lengths_that_repeat_are_refused(no_prompts, tiny_llm, tmp_path):
    words = [f"--run={tmp_path / 'run'}", f"--model={tiny_llm}", "--lengths=2048,1024,2048"]
    code, _, err = run("ruler", *words)
    assert code == 2
    assert "--lengths must differ, got '2048,1024,2048'; give each once." in err


def test_a_report_of_something_else_is_not_replaced(no_prompts, tiny_llm, tmp_path):
    (tmp_path / "report.md").write_text("mine")
    code, _, err = run("ruler", f"--run={tmp_path}", f"--model={tiny_llm}", "--lengths=2048")
    assert code == 2
    assert "holds report.md and no run; give another --run, or move it." in err
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [
        ("report.md", "mine")
    ]


def test_data_that_several_tries_did_not_get_is_one_line(harnesses, tmp_path, monkeypatch):
    class RetryError(Exception):
        @property
        def last_attempt(self):
            return self

        def result(self):
            raise FileNotFoundError("no network")

    def get_task_dict(*_):
        raise RetryError

    monkeypatch.setattr(harnesses("lmms_eval.tasks"), "get_task_dict", get_task_dict)
    code, _, err = run("videomme", f"--run={tmp_path / 'run'}", "--model=any", "--tasks=videomme")
    assert code == 2
    assert err.startswith("error: the data of videomme is not available: no network; ")


@pytest.mark.parametrize("name", ["ruler", "longbench", "videomme", "perplexity"])
def test_random_weights_are_refused(name, no_prompts, tmp_path):
    code, _, err = run(name, f"--run={tmp_path / 'run'}", "--model=random:tiny")
    assert code == 2, err
    assert err.startswith(
        "error: model 'random:tiny' has random weights, whose answers mean nothi"
    )
    assert err.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_task_without_room_is_left_out_and_told(harnesses, tiny_llm, tmp_path):
    harnesses("lm_eval.tasks").NO_ROOM.append(("ruler_vt", 1024))
    words = ("--settings=0.5:8", "--lengths=1024,1100")
    for _ in ("a new run", "the same again"):
        code, _, err = ruler(tmp_path / "run", tiny_llm, *words)
        assert code == 0, err
        told = "ruler_vt has no room for an answer in a length of 1,024 and is left out."
        assert f"warning: {told}\n" in err
    report = json.loads((tmp_path / "run/report.json").read_text())
    ran = ["niah_multikey_2, 1024", "niah_multikey_2, 1100", "ruler_vt, 1100"]
    assert report["tasks"] == ran
    assert [*dict.fromkeys(one["task"] for one in report["results"])] == ran
    page = (tmp_path / "run/report.md").read_text()
    assert "ruler_vt, 1024 has no room for an answer and is left out." in page


def test_the_harness_may_say_itself_that_there_is_no_room(
    harnesses, tiny_llm, tmp_path, monkeypatch
):
    manager = harnesses("lm_eval.tasks").TaskManager
    load = manager.load

    def without_room(self, names):
        if names == ["niah_multikey_2"]:
            raise ValueError("Could not generate any sample for haystack 'needle' at ...")
        return load(self, names)

    monkeypatch.setattr(manager, "load", without_room)
    code, _, err = ruler(tmp_path / "run", tiny_llm, "--settings=0.5:8")
    assert code == 0, err
    assert "niah_multikey_2 has no room for an answer in a length of 1,024 and" in err


def test_a_run_without_any_task_is_refused(harnesses, tiny_llm, tmp_path):
    harnesses("lm_eval.tasks").NO_ROOM.append(("ruler_vt", 1024))
    code, _, err = ruler(tmp_path / "run", tiny_llm, "--tasks=ruler_vt")
    assert code == 2, err
    assert "error: no task has room for an answer, got --lengths 1024; use longer ones" in err
    assert not (tmp_path / "run").exists()


def test_git_prints_nothing(harnesses, tiny_llm, tmp_path, capfd):
    assert ruler(tmp_path / "run", tiny_llm, "--settings=0.5:8")[0] == 0
    words = (f"--run={tmp_path / 'videos'}", "--model=any", "--settings=0.5:16", "--samples=4")
    assert run("videomme", *words, "--tasks=videomme")[0] == 0
    assert "fatal" not in capfd.readouterr().err
