"""What `xattn-video generate` refuses, before any model is loaded."""

import errno
import json
from pathlib import Path

import pytest
from command_line import SMALL, run_cli


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
        (["--prompt=a", "--threshold=0"], "--threshold must lie in (0, 1], got 0.0"),
        (["--prompt=a", "--threshold=1.5"], "--threshold must lie in (0, 1], got 1.5"),
        (
            ["--prompt=a", "--threshold=0.9", "--dense"],
            "--threshold and --dense cannot be combined",
        ),
        (
            ["--prompt=a", "--threshold=0.9", "--schedule=s.json"],
            "--threshold and --schedule cannot be combined",
        ),
        (
            ["--prompt=a", "--threshold=0.95", "--density=0.1"],
            "--threshold and --density cannot be combined",
        ),
        (
            ["--preset=fast", "--threshold=0.9"],
            "--threshold and --preset cannot be combined",
        ),
        (["--preset=best"], "--preset must be one of quality, balanced, fast, got 'best'"),
        (
            ["--preset=fast", "--token-order=hilbert"],
            "--preset='fast' already sets --threshold, --density, --token-order",
        ),
        # Also what would be the default.
        (["--preset=fast", "--token-order=raster"], "got --token-order too; omit one"),
        (["--preset=fast", "--compensation=none"], "got compensation too; omit one"),
        (["--preset=fast", "--mask-every=1"], "got --mask-every too; omit one"),
        (["--prompt=a", "--density=1.5"], "--density must lie in (0, 1], got 1.5"),
        (["--prompt=a", "--refresh-every=0"], "--refresh-every must be at least 1 step, got 0"),
        (["--prompt=a", "--refresh-every=60"], "at most the number of denoising steps, got 60"),
        (
            ["--prompt=a", "--residual=host"],
            "--residual='host' has no effect without --refresh-every",
        ),
        (["--prompt=a", "--schedule=missing.json"], "cannot read the schedule 'missing.json'"),
        (["--prompt=a", "--stride=12"], "--stride must divide --block-size, got --stride=12"),
        (["--prompt=a", "--warmup-steps=-1"], "--warmup-steps must be at least 0, got -1"),
        (
            ["--prompt=a", "--height=100"],
            "--height must be a positive multiple of 16 pixels, got 100",
        ),
        (["--prompt=a", "--width=0"], "--width must be a positive multiple of 16 pixels, got 0"),
        (["--prompt=a", "--num-frames=10"], "--num-frames must be 4k + 1, such as 33, 65 or 129"),
        (
            ["--prompt=a", "--num-inference-steps=0"],
            "--num-inference-steps must be at least 1, got 0",
        ),
        (["--prompt=a", "--fps=0"], "--fps must lie between 1 and 240, got 0"),
        (["--prompt=a", "--seed=-1"], "--seed must lie between 0 and 2**63 - 1, got -1"),
        (
            ["--prompt=a", "--negative-prompt=b"],
            "a negative prompt needs --true-cfg-scale above 1",
        ),
        (["--prompt=a", "--dtype=int8"], "--dtype must be one of float32, float16, bfloat16"),
        (["--prompt=a", "--device=tpu9"], "--device must be cpu, cuda or cuda:N, got 'tpu9'"),
        (
            ["--prompt=a", "--offload=all"],
            "--offload must be one of none, model, sequential, group",
        ),
        (["--prompt=a", "--offload=model"], "offload='model' needs a GPU"),
        (["--prompt=a", "--backend=fast"], "unknown attention backend 'fast'"),
        (
            ["--prompt=a", "--scoring-precision=int8"],
            'must be "auto", "exact" or "float8", got \'int8\'',
        ),
        (
            ["--prompt=a", "--attention-backend=fast"],
            "unknown attention backend 'fast' for the dense",
        ),
        (
            ["--prompt=a", "--output=a.gif"],
            "--output must end in .mp4 or .mkv, got 'a.gif'; give the name of such a file",
        ),
        (["--prompt=a", "--output=/proc/a.mp4"], "--output cannot be written to '/proc'"),
        (["--prompt=a", "--report=/proc/a.json"], "--report cannot be written to '/proc'"),
        (
            ["--prompt=a", f"--output={'a' * 252}.mp4"],
            ".mp4': File name too long; use another",
        ),
        (["--prompt=a", "--report=a.txt"], "--report must end in .json"),
        (["--prompt=a", "--plot=a.jpg"], "--plot must end in .png"),
        (["--prompt=a", "--html=a.txt"], "--html must end in .html"),
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
    ("option", "message"),
    [
        ("--stride=12", "--stride must divide --block-size, got --stride=12"),
        ("--block-size=0", "--block-size must be at least 1 token, got 0"),
        ("--warmup-steps=-1", "--warmup-steps must be at least 0, got -1"),
        ("--min-tokens=-1", "--min-tokens must be at least 0, got -1"),
        ("--backend=fast", "unknown attention backend 'fast'"),
        ("--scoring-precision=int8", "got 'int8'"),
    ],
)
def test_dense_makes_no_wrong_option_right(option, message, generate):
    code, _, err = generate("--prompt=a", "--dense", option)
    assert code == 2
    assert message in err


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "contains no prompt; expected one per line"),
        ("# a comment\n\n   \n", "contains no prompt; expected one per line"),
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
    for what, name in (("output", "a.mp4"), ("plot", "p.png")):
        code, _, err = generate("--prompts-file=p.txt", f"--{what}={name}")
        assert code == 2
        assert f"with --prompts-file, the --{what} must be a folder, got {name!r}; give" in err
        assert not (tmp_path / name).exists()


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize("option", ["output", "plot"])
def test_folders_that_cannot_be_written_are_refused(option, generate, tmp_path):
    (tmp_path / "p.txt").write_text("a\nb\n")
    (tmp_path / "file").write_text("")
    for folder in ("/proc/videos", "file"):
        code, _, err = generate("--prompts-file=p.txt", f"--{option}={folder}")
        assert code == 2
        assert f"error: --{option} cannot be written to {folder!r}" in err


@pytest.fixture
def locked(tmp_path, monkeypatch):
    """A folder that one may not search; mode bits would not keep root out of it."""
    folder = tmp_path / "locked"

    def guard(real):
        def guarded(self, *arguments, **options):
            if self.is_relative_to(folder) and self != folder:
                raise PermissionError(errno.EACCES, "Permission denied", str(self))
            return real(self, *arguments, **options)

        return guarded

    for name in ("stat", "mkdir", "is_dir", "is_file", "exists", "open", "read_text"):
        monkeypatch.setattr(Path, name, guard(getattr(Path, name)))
    return folder


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["generate", "--output={}/a.mp4"], "--output cannot be written to"),
        (["generate", "--output=a.mp4", "--report={}/a.json"], "--report cannot be written to"),
        (["generate", "--output=a.mp4", "--plot={}/a.png"], "--plot cannot be written to"),
        (["generate", "--output=a.mp4", "--model={}/model"], "cannot read the model"),
        (["plan", "--model={}/model"], "cannot read the model"),
        (["compare", "--reference={}/a.mkv", "--candidate={}/b.mkv"], "cannot read"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_folders_that_one_may_not_search_are_refused(
    command, message, locked, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    words = [word.format(locked) for word in command]
    code, _, err = run_cli(*words, *(["--prompt=a"] if words[0] == "generate" else []))
    assert code == 2, err
    assert err.startswith(f"error: {message}")
    assert "Permission denied; " in err
    assert "[Errno" not in err
    assert err.count("\n") == 1


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize("file", ["model_index.json", "vae/diffusion_pytorch_model.safetensors"])
def test_files_of_a_model_that_one_may_not_read_are_refused(file, tiny_pipeline, monkeypatch):
    real = Path.open

    def refuse(self, *arguments, **options):
        if self == tiny_pipeline / file:
            raise PermissionError(errno.EACCES, "Permission denied", str(self))
        return real(self, *arguments, **options)

    monkeypatch.setattr(Path, "open", refuse)
    code, _, err = run_cli("plan", "--model", tiny_pipeline)
    assert code == 2, err
    assert err.startswith(f"error: cannot read '{tiny_pipeline / file}': Permission denied; ")


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


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"layers": {"3": [[0, 0.9]]}}, "names layer 3, but the model has 3 layers, 0 to 2"),
        ({"heads": {"0": {"2": [[0, 0.9]]}}}, "names head 2 of layer 0, but a layer has 2 heads"),
    ],
    ids=["layer", "head"],
)
@pytest.mark.parametrize("command", ["generate", "plan"])
def test_schedules_for_another_model_are_refused(
    values, message, command, generate, tmp_path, tiny_pipeline
):
    (tmp_path / "s.json").write_text(json.dumps({"points": [[0, 0.95]], **values}))
    if command == "generate":
        code, _, err = generate("--prompt=a", "--schedule=s.json")
    else:
        code, _, err = run_cli("plan", "--model", tiny_pipeline, *SMALL, "--schedule=s.json")
    assert code == 2
    assert message in err
    assert err.startswith("error: ")
    assert err.count("\n") == 1


@pytest.mark.usefixtures("no_model", "no_triton")
def test_a_backend_that_cannot_run_says_why_before_the_model_is_loaded(generate):
    code, _, err = generate("--prompt=a", "--backend=triton")
    assert code == 2
    assert "'triton' cannot run this problem" in err
    assert err.endswith("\n  - no GPU; get one.\n")


@pytest.mark.usefixtures("no_model")
def test_an_attention_backend_without_its_package_says_why_before_the_model_is_loaded(
    generate, monkeypatch
):
    from diffusers.models import attention_dispatch

    monkeypatch.setattr(attention_dispatch, "_CAN_USE_FLASH_ATTN", False)
    code, _, err = generate("--prompt=a", "--attention-backend=flash")
    assert code == 2
    assert err.startswith("error: attention backend 'flash' cannot run this problem:\n  - ")
    assert "install `flash-attn>=" in err


@pytest.mark.usefixtures("no_model")
def test_a_scoring_precision_that_cannot_be_had_says_why_before_the_model_is_loaded(
    generate, monkeypatch
):
    from xattn_video.ops import scoring

    monkeypatch.setattr(
        scoring, "triton_unsupported_reasons", lambda *_, **__: ["too old a GPU; score exactly."]
    )
    code, _, err = generate("--prompt=a", "--scoring-precision=float8")
    assert code == 2
    assert 'scoring precision "float8" is not available: too old a GPU; score exactly.' in err


def model_errors(tmp_path: Path) -> list[tuple[str, str]]:
    wan, empty, broken = (tmp_path / name for name in ("wan", "empty", "broken"))
    for folder in (wan, empty, broken):
        folder.mkdir()
    (wan / "model_index.json").write_text('{"_class_name": "WanPipeline"}')
    (broken / "model_index.json").write_text("{")
    return [
        (str(wan), "is a WanPipeline, but the command line loads text-to-video pipelines only"),
        (str(empty), "is not a Diffusers pipeline: it has no model_index.json"),
        (str(broken), "is not valid JSON"),
        ("./nowhere", "model './nowhere' is neither a folder nor a hub ID"),
    ]


@pytest.mark.usefixtures("no_model")
def test_models_that_are_none_of_ours_are_refused(tmp_path):
    for model, message in model_errors(tmp_path):
        code, _, err = run_cli(
            "generate", "--prompt=a", f"--output={tmp_path / 'a.mp4'}", "--model", model
        )
        assert code == 2, err
        assert message in err
        assert err.count("\n") == 1


@pytest.mark.usefixtures("no_model")
def test_the_demo_model_in_float16_is_refused(tmp_path):
    """Its VAE's values leave float16's range, and the video would not be finite."""
    code, _, err = run_cli(
        "generate",
        "--model=demo",
        "--prompt=a red circle moving left to right over a blue background",
        "--dtype=float16",
        "--device=cpu",
        f"--output={tmp_path / 'a.mp4'}",
    )
    assert code == 2
    assert err == (
        "error: dtype float16 cannot represent the values of the demo model's VAE; "
        "use bfloat16 or float32.\n"
    )


@pytest.mark.usefixtures("no_model")
def test_a_hub_that_cannot_be_reached_is_one_line(tmp_path, monkeypatch):
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    def offline(name, path):
        raise LocalEntryNotFoundError("no connection\nand no cache")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", offline)
    arguments = ("--prompt=a", f"--output={tmp_path / 'a.mp4'}", "--model=some/model")
    code, _, err = run_cli("generate", *arguments)
    assert code == 2
    assert "cannot load 'some/model' from the hub: the hub cannot be reached" in err
    assert "--model demo" in err
    assert err.count("\n") == 1


def test_unparsable_options_exit_with_code_2(generate):
    code, _, err = generate("--prompt=a", "--height=tall")
    assert code == 2
    assert "--height" in err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["generate", "--promt", "a"], "error: No such option: --promt"),
        (["generat"], "error: No such command 'generat'."),
        (["generate", "--seed", "x"], "error: Invalid value for '--seed':"),
        (["plan", "more"], "error: Got unexpected extra argument"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_words_that_are_no_option_are_one_line(words, message):
    code, out, err = run_cli(*words)
    assert code == 2
    assert out == ""
    (line,) = err.splitlines()
    assert line.startswith(message)
    assert line.endswith(" --help.")


def test_no_words_at_all_show_the_help():
    code, out, err = run_cli()
    assert (code, err) == (0, "")
    assert "Usage: xattn-video" in out
    assert "generate" in out
