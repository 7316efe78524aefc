"""Where prompts come from and how files are named."""

import pytest
from command_line import SMALL, run_cli

from xattn_video.cli.outputs import default_name, read_prompts, reserved, unused_path


def test_prompts_are_lines(tmp_path):
    (tmp_path / "p.txt").write_text("  a  \n# b\n\nc, d # e\n")
    assert read_prompts(tmp_path / "p.txt") == ["a", "c, d # e"]


def test_only_ends_of_lines_separate_prompts(tmp_path):
    text = "a\u2028b\x85c\x0cd\r\ne\rf\n"
    (tmp_path / "p.txt").write_bytes(text.encode())
    assert read_prompts(tmp_path / "p.txt") == ["a\u2028b\x85c\x0cd", "e", "f"]


def test_a_byte_order_mark_is_no_part_of_a_prompt(tmp_path):
    (tmp_path / "p.txt").write_text("# b\na\n", encoding="utf-8-sig")
    assert read_prompts(tmp_path / "p.txt") == ["a"]
    (tmp_path / "p.txt").write_text("", encoding="utf-8-sig")
    with pytest.raises(ValueError, match="contains no prompt; expected one per line"):
        read_prompts(tmp_path / "p.txt")


@pytest.mark.parametrize(
    ("prompt", "name"),
    [
        ("A red circle, moving right!", "a-red-circle-moving-right-seed3"),
        ("../../etc/passwd", "etc-passwd-seed3"),
        ("!?", "video-seed3"),
        ("word " * 50, "-".join(["word"] * 10) + "-seed3"),
        ("日本の猫", "日本の猫-seed3"),
    ],
)
def test_file_names_come_from_prompts(prompt, name):
    assert default_name(prompt, 3) == name


def test_a_name_that_another_run_takes_meanwhile_is_numbered(tmp_path):
    with reserved(tmp_path / "a.mp4") as first, reserved(tmp_path / "a.mp4") as second:
        assert [first.name, second.name] == ["a.mp4", "a-2.mp4"]
        first.write_text("first")
    with pytest.raises(RuntimeError), reserved(tmp_path / "a.mp4"):
        raise RuntimeError
    assert {file.name for file in tmp_path.iterdir()} == {"a.mp4", "a-2.mp4"}
    assert (tmp_path / "a.mp4").read_text() == "first"


def test_taken_names_are_numbered(tmp_path):
    (tmp_path / "a.mp4").write_text("")
    taken = {tmp_path / "a-2.mp4"}
    assert unused_path(tmp_path, "a", ".mp4", taken) == tmp_path / "a-3.mp4"


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize(
    "words",
    [
        ["generate", "--prompt=a", "--output=x/a.mp4", "--report=y/a.json", "--html=z/a.html"],
        ["generate", "--prompt=a", "--output=x/a.mp4", "--plot=y/z/a.png"],
        ["generate", "--prompts-file=p.txt", "--output=x", "--plot=y", "--html=x/a.html"],
        ["compare", "--prompt=a", "--output=x"],
        ["calibrate", "--prompt=a", "--density=0.2", "--output=x/a.json"],
    ],
    ids=lambda words: " ".join(words),
)
def test_a_refused_command_creates_no_folder(words, tiny_pipeline, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p.txt").write_text("a\n")
    code, _, err = run_cli(*words, *SMALL, "--model", tiny_pipeline, "--backend=flash4")
    assert code == 2, err
    assert "attention backend 'flash4' cannot run this problem" in err
    assert [path.name for path in tmp_path.iterdir()] == ["p.txt"]


def test_a_refused_prefill_creates_no_folder(tmp_path):
    words = ("--model=random:tiny", "--tokens=300", "--backend=flash4", "--device=cpu")
    code, _, err = run_cli("prefill", *words, f"--report={tmp_path / 'x/a.json'}")
    assert (code, list(tmp_path.iterdir())) == (2, []), err
