"""The command line: what it refuses and how, what it writes, what it says."""

import json
import subprocess
import sys
from pathlib import Path

import imageio.v3 as imageio
import pytest
from typer.testing import CliRunner

from xattn_video.cli import app
from xattn_video.cli.outputs import default_name, read_prompts, unused_path

ROOT = Path(__file__).parents[1]
# 64x64x9 is 48 video tokens, in blocks of 16.
SMALL = [
    "--height=64",
    "--width=64",
    "--num-frames=9",
    "--num-inference-steps=4",
    "--device=cpu",
    "--dtype=float32",
]
SPARSE = ["--block-size=16", "--min-tokens=0", "--warmup-steps=2", "--threshold=0.8"]


def run(*arguments: object) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a command."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    return result.exit_code, result.stdout, result.stderr


@pytest.fixture
def generate(tiny_pipeline, tmp_path, monkeypatch):
    """Run `generate` on the tiny pipeline within an empty folder."""
    monkeypatch.chdir(tmp_path)

    def run_generate(*arguments: object) -> tuple[int, str, str]:
        return run("generate", "--model", tiny_pipeline, *SMALL, *arguments)

    return run_generate


@pytest.fixture
def no_model(monkeypatch):
    """Fail the test if a model is loaded."""
    from xattn_video.pipelines import hunyuan_video

    def refuse(options):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(hunyuan_video, "load_pipeline", refuse)


@pytest.fixture
def no_triton(monkeypatch):
    """Triton can run nowhere, not even interpreted."""
    from xattn_video.backends import triton

    monkeypatch.setattr(triton, "unsupported_reasons", lambda problem: ["no GPU; get one."])


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give --prompt or --prompts-file, got none"),
        (["--prompt=a", "--prompts-file=p.txt"], "give --prompt or --prompts-file, got both"),
        (["--prompt= "], "the prompt is empty"),
        (
            ["--prompts-file=missing.txt"],
            "cannot read the prompts file 'missing.txt': No such file",
        ),
        (["--prompt=a", "--threshold=0"], "threshold must lie in (0, 1], got 0.0"),
        (["--prompt=a", "--threshold=1.5"], "threshold must lie in (0, 1], got 1.5"),
        (
            ["--prompt=a", "--threshold=0.9", "--dense"],
            "--threshold and --dense exclude each other",
        ),
        (
            ["--prompt=a", "--threshold=0.9", "--schedule=s.json"],
            "--threshold and --schedule exclude each other",
        ),
        (["--prompt=a", "--schedule=missing.json"], "cannot read the schedule 'missing.json'"),
        (["--prompt=a", "--stride=12"], "stride must divide block_size, got stride=12"),
        (["--prompt=a", "--warmup-steps=-1"], "warmup_steps must be at least 0, got -1"),
        (
            ["--prompt=a", "--height=100"],
            "height must be a positive multiple of 16 pixels, got 100",
        ),
        (["--prompt=a", "--width=0"], "width must be a positive multiple of 16 pixels, got 0"),
        (["--prompt=a", "--num-frames=10"], "num_frames must be 4k + 1, such as 33, 65 or 129"),
        (
            ["--prompt=a", "--num-inference-steps=0"],
            "num_inference_steps must be at least 1, got 0",
        ),
        (["--prompt=a", "--fps=0"], "fps must be at least 1, got 0"),
        (["--prompt=a", "--seed=-1"], "seed must lie between 0 and 2**63 - 1, got -1"),
        (["--prompt=a", "--negative-prompt=b"], "a negative prompt needs true_cfg_scale above 1"),
        (["--prompt=a", "--dtype=int8"], "dtype must be one of float32, float16, bfloat16"),
        (["--prompt=a", "--device=tpu9"], "device must be cpu, cuda or cuda:N, got 'tpu9'"),
        (["--prompt=a", "--offload=all"], "offload must be one of none, model, sequential, group"),
        (["--prompt=a", "--offload=model"], "offload='model' moves parts off an accelerator"),
        (["--prompt=a", "--backend=fast"], "unknown attention backend 'fast'"),
        (["--prompt=a", "--scoring-precision=int8"], 'must be "exact" or "float8", got \'int8\''),
        (
            ["--prompt=a", "--attention-backend=fast"],
            "unknown attention backend 'fast' for the dense",
        ),
        (["--prompt=a", "--output=a.gif"], "output must end in .mp4 or .mkv, got 'a.gif'"),
        (["--prompt=a", "--output=/proc/a.mp4"], "output cannot be written to '/proc'"),
        (["--prompt=a", "--report=/proc/a.json"], "report cannot be written to '/proc'"),
        (["--prompt=a", "--report=a.txt"], "report must end in .json"),
        (["--prompt=a", "--plot=a.jpg"], "plot must end in .png"),
        (["--prompt=a", "--plot=a.png", "--dense"], "--dense has none"),
    ],
    ids=lambda value: " ".join(value)[:60] if isinstance(value, list) else "",
)
def test_bad_arguments_are_one_line_and_exit_code_2(arguments, message, generate):
    code, out, err = generate(*arguments)
    assert code == 2
    assert out == ""
    assert err.startswith("error: ")
    assert message in err
    assert err.count("\n") == 1


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "holds no prompt; expected one a line"),
        ("# a comment\n\n   \n", "holds no prompt; expected one a line"),
        (b"\xff\xfe\x00", "is not UTF-8 text"),
    ],
    ids=["empty", "comments", "binary"],
)
def test_prompts_files_without_prompts_are_refused(content, message, generate, tmp_path):
    (tmp_path / "p.txt").write_bytes(content if isinstance(content, bytes) else content.encode())
    code, _, err = generate("--prompts-file=p.txt")
    assert code == 2
    assert message in err


@pytest.mark.usefixtures("no_model")
def test_many_videos_need_a_folder(generate, tmp_path):
    (tmp_path / "p.txt").write_text("a\nb\n")
    code, _, err = generate("--prompts-file=p.txt", "--output=a.mp4")
    assert code == 2
    assert "with --prompts-file the output is a folder, got 'a.mp4'" in err


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        ({"points": [[0, 0.9]], "taus": []}, "unknown key 'taus' in the schedule"),
        ({"points": "0.9"}, "points must be a list of [step, threshold] pairs"),
        ({"points": [[0, 2.0]]}, "points[0][1] must lie in (0, 1], got 2.0"),
    ],
    ids=["unknown key", "wrong type", "out of range"],
)
def test_bad_schedules_are_refused(schedule, message, generate, tmp_path):
    (tmp_path / "s.json").write_text(json.dumps(schedule))
    code, _, err = generate("--prompt=a", "--schedule=s.json")
    assert code == 2
    assert f"error: s.json: {message}" in err


@pytest.mark.usefixtures("no_model", "no_triton")
def test_a_backend_that_cannot_run_says_why_before_the_model_is_loaded(generate):
    code, _, err = generate("--prompt=a", "--backend=triton")
    assert code == 1
    assert "'triton' cannot run this problem" in err
    assert err.endswith("\n  - no GPU; get one.\n")


@pytest.mark.usefixtures("no_model")
def test_a_scoring_precision_that_cannot_be_had_says_why_before_the_model_is_loaded(
    generate, monkeypatch
):
    from xattn_video import scoring

    monkeypatch.setattr(
        scoring, "triton_unsupported_reasons", lambda *_, **__: ["too old a GPU; score exactly."]
    )
    code, _, err = generate("--prompt=a", "--scoring-precision=float8")
    assert code == 2
    assert 'scoring precision "float8" cannot be honoured: too old a GPU; score exactly.' in err


def model_errors(tmp_path: Path) -> list[tuple[str, str]]:
    wan, empty, broken = (tmp_path / name for name in ("wan", "empty", "broken"))
    for folder in (wan, empty, broken):
        folder.mkdir()
    (wan / "model_index.json").write_text('{"_class_name": "WanPipeline"}')
    (broken / "model_index.json").write_text("{")
    return [
        (str(wan), "is a WanPipeline; supported is HunyuanVideoPipeline"),
        (str(empty), "is no Diffusers pipeline: it has no model_index.json"),
        (str(broken), "is not valid JSON"),
        ("./nowhere", "model './nowhere' is neither a folder nor a hub ID"),
    ]


@pytest.mark.usefixtures("no_model")
def test_models_that_are_none_of_ours_are_refused(tmp_path):
    for model, message in model_errors(tmp_path):
        code, _, err = run(
            "generate", "--prompt=a", f"--output={tmp_path / 'a.mp4'}", "--model", model
        )
        assert code == 2, err
        assert message in err
        assert err.count("\n") == 1


@pytest.mark.usefixtures("no_model")
def test_a_hub_that_cannot_be_reached_is_one_line(tmp_path, monkeypatch):
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    def offline(name, path):
        raise LocalEntryNotFoundError("no connection\nand no cache")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", offline)
    arguments = ("--prompt=a", f"--output={tmp_path / 'a.mp4'}", "--model=some/model")
    code, _, err = run("generate", *arguments)
    assert code == 1
    assert "cannot load 'some/model' from the hub: the hub cannot be reached" in err
    assert "--model demo" in err
    assert err.count("\n") == 1


def test_unparsable_options_exit_with_code_2(generate):
    code, _, err = generate("--prompt=a", "--height=tall")
    assert code == 2
    assert "--height" in err


def test_a_video_with_its_report_and_plot(generate, tmp_path):
    code, out, err = generate(
        "--prompt=a red circle",
        *SPARSE,
        "--output=new/a.mp4",
        "--report=new/run.json",
        "--plot=new/run.png",
    )
    assert code == 0, err
    assert imageio.imread(tmp_path / "new/a.mp4").shape == (9, 64, 64, 3)
    assert (tmp_path / "new/run.png").read_bytes().startswith(b"\x89PNG")
    record = json.loads((tmp_path / "new/run.json").read_text())
    assert record["dtype"] == "float32"
    (video,) = record["runs"]
    assert video["file"] == "new/a.mp4"
    assert video["prompt"] == "a red circle"
    assert video["sparse"]["threshold"] == 0.8
    assert [step["sparse"] for step in video["steps"]] == [False, False, True, True]
    assert video["report"]["num_sparse_steps"] == 2
    assert video["report"]["dense_reasons"] == {"warm-up": 6}
    assert video["peak_memory_gib"] > 0
    assert "2/4 steps x 3/3 layers sparse, density" in out
    assert "0 refused" in out
    for text in ("new/a.mp4", "new/run.json", "new/run.png", "torch_gather", "2 dense steps of"):
        assert text in out
    assert "an estimate" in out
    assert "step 4/4" in err
    assert "\x1b" not in out + err


def test_markup_in_a_prompt_is_text(generate):
    code, _, err = generate("--prompt=[bold] :smile: [/] cat", "--dense", "--output=a.mp4")
    assert code == 0, err
    assert "[bold] :smile: [/] cat" in err


def test_a_run_that_stayed_dense_says_why(generate):
    code, out, err = generate("--prompt=a", "--output=a.mp4", "--warmup-steps=0")
    assert code == 0, err
    assert "0/4 steps x 0/3 layers sparse" in out
    assert "too few tokens" in out


def test_verbose_tells_the_backend(generate, caplog):
    from xattn_video.registry import _resolve_auto

    _resolve_auto.cache_clear()
    code, _, err = generate("--prompt=a", *SPARSE, "--output=a.mp4", "--verbose")
    assert code == 0, err
    assert "attention backend 'torch_gather' chosen" in caplog.text


def test_prompts_beyond_the_demo_models_words_are_warned_of(capsys):
    from xattn_video.cli.checks import warn_of_unknown_words

    known = "a red circle moving left to right over a blue background"
    warn_of_unknown_words([known, "a cat", "a dog"])
    err = capsys.readouterr().err
    assert err.startswith("warning: the prompt is not in the demo model's grammar, got 'a cat'")
    assert err.count("warning") == 1


def test_default_names_are_numbered(generate, tmp_path):
    for _ in range(2):
        code, _, err = generate("--prompt=A red circle!", "--dense", "--seed=7")
        assert code == 0, err
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["a-red-circle-seed7-2.mp4", "a-red-circle-seed7.mp4"]


def test_an_output_given_by_name_is_replaced_and_it_says_so(generate, tmp_path):
    (tmp_path / "a.mkv").write_text("old")
    code, out, err = generate("--prompt=a", "--dense", "--output=a.mkv")
    assert code == 0, err
    assert "a.mkv (replaced)" in out
    assert "dense in all 4 steps" in out
    assert imageio.imread(tmp_path / "a.mkv").shape == (9, 64, 64, 3)


def test_a_prompts_file_becomes_a_folder(generate, tmp_path):
    (tmp_path / "p.txt").write_text("# two\na red circle\n\na blue ring\n")
    code, out, err = generate(
        "--prompts-file=p.txt", *SPARSE, "--output=o", "--plot=plots", "--report=o/run.json"
    )
    assert code == 0, err
    stems = ["a-blue-ring-seed0", "a-red-circle-seed0"]
    assert sorted(path.stem for path in (tmp_path / "o").glob("*.mp4")) == stems
    assert sorted(path.stem for path in (tmp_path / "plots").glob("*.png")) == stems
    runs = json.loads((tmp_path / "o/run.json").read_text())["runs"]
    assert [video["prompt"] for video in runs] == ["a red circle", "a blue ring"]
    assert all(video["report"]["num_sparse_steps"] == 2 for video in runs)
    assert out.count("2/4 steps x 3/3 layers sparse") == 2


def test_schedules_and_true_guidance_reach_the_processor(generate, tmp_path):
    (tmp_path / "s.json").write_text(json.dumps({"points": [[0, 0.7], [3, 1.0]]}))
    code, _, err = generate(
        "--prompt=a",
        *SPARSE[:-1],
        "--warmup-steps=1",
        "--schedule=s.json",
        "--true-cfg-scale=3",
        "--negative-prompt=blur",
        "--report=run.json",
    )
    assert code == 0, err
    (video,) = json.loads((tmp_path / "run.json").read_text())["runs"]
    assert [step["sparse"] for step in video["steps"]] == [False, True, True, False]
    assert len(video["report"]["forwards"]) == 8
    assert video["sparse"]["threshold"]["points"] == [[0, 0.7], [3, 1.0]]


def test_a_run_that_fails_exits_with_code_1(generate, monkeypatch, tmp_path):
    from xattn_video.pipelines import generation

    def fail(*arguments):
        raise RuntimeError("CUDA out of memory.\nTried to allocate")

    monkeypatch.setattr(generation, "generate", fail)
    code, _, err = generate("--prompt=a", "--dense")
    assert code == 1
    assert err.splitlines()[-1] == "error: CUDA out of memory. Tried to allocate"
    assert "Traceback" not in err
    assert list(tmp_path.iterdir()) == []
    code, _, err = generate("--prompt=a", "--dense", "--verbose")
    assert code == 1
    assert "Traceback" in err


@pytest.mark.usefixtures("no_triton")
def test_backends_lists_every_backend_with_its_reasons():
    code, out, _ = run("backends", "--device=cpu")
    assert code == 0
    lines = out.splitlines()
    assert "cpu, float32, head size 128, blocks of 128 tokens" in lines[0]
    rows = [line.rstrip().split(maxsplit=2) for line in lines]
    assert ["torch_gather", "yes"] in rows
    assert ["triton", "no", "- no GPU; get one."] in rows
    assert lines[-1] == "auto takes torch_gather."


def test_plan_for_a_person_and_for_a_program(tiny_pipeline):
    code, out, err = run("plan", "--model", tiny_pipeline, "--device=cpu")
    assert code == 0, err
    assert "118,800 video (33 x 45 x 80) + up to 256 text" in out
    assert "5 dense, 45 sparse, 3 layers" in out
    assert "the paper's densities for HunyuanVideo, not a measurement" in out
    code, out, _ = run("plan", "--model", tiny_pipeline, "--device=cpu", "--json", "--dense")
    assert json.loads(out)["sparse_steps"] == 0


def test_plan_warns_where_sparse_attention_would_not_pay(tiny_pipeline):
    code, _, err = run("plan", "--model", tiny_pipeline, *SMALL)
    assert code == 0
    assert err.startswith("warning: No step is sparse: 48 video tokens")


def test_the_command_itself(tiny_pipeline, tmp_path):
    """A process of its own: entry point, quiet libraries, exit code."""
    command = [sys.executable, "-m", "xattn_video.cli", "generate", "--model", str(tiny_pipeline)]
    done = subprocess.run(
        [*command, *SMALL, *SPARSE, "--prompt=a", f"--output={tmp_path / 'a.mp4'}"],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "a.mp4").stat().st_size > 0
    messages = [line for line in done.stderr.splitlines() if not line.startswith("warning: ")]
    assert messages[:2] == [f"loading {tiny_pipeline}", "a"]
    assert all(line.startswith("  step ") for line in messages[2:])


@pytest.mark.slow
@pytest.mark.skipif(
    not (ROOT / "xattn_video/pipelines/demo/model/model_index.json").is_file(),
    reason="needs the demo model's files",
)
def test_the_readmes_first_command(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    prompt = "a red circle moving left to right over a blue background"
    code, out, err = run("generate", "--model=demo", f"--prompt={prompt}", "--report=run.json")
    assert code == 0, err
    (video,) = json.loads((tmp_path / "run.json").read_text())["runs"]
    assert [step["sparse"] for step in video["steps"]] == [False] * 5 + [True] * 20
    assert "20/25 steps x" in out
    assert imageio.imread(tmp_path / video["file"]).shape == (65, 256, 256, 3)


def test_help_needs_no_heavy_import():
    code = """
import sys
for name in ("torch", "diffusers", "transformers", "numpy", "imageio", "matplotlib"):
    sys.modules[name] = None
from typer.testing import CliRunner
from xattn_video.cli import app
for command in ([], ["generate"], ["plan"], ["backends"]):
    result = CliRunner().invoke(app, [*command, "--help"])
    assert result.exit_code == 0, result.output
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_the_version():
    from xattn_video import __version__

    assert run("--version")[1] == f"xattn-video {__version__}\n"


def test_prompts_are_lines(tmp_path):
    (tmp_path / "p.txt").write_text("  a  \n# b\n\nc, d # e\n")
    assert read_prompts(tmp_path / "p.txt") == ["a", "c, d # e"]


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


def test_taken_names_are_numbered(tmp_path):
    (tmp_path / "a.mp4").write_text("")
    taken = {tmp_path / "a-2.mp4"}
    assert unused_path(tmp_path, "a", ".mp4", taken) == tmp_path / "a-3.mp4"
