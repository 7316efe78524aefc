"""`xattn-video compare`: what it measures and writes, and what it refuses."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from command_line import run_cli
from typer.main import get_command

from xattn_video.cli import app
from xattn_video.cli.compare_options import GRID
from xattn_video.measure.clips import read_clip
from xattn_video.measure.comparison_rows import MethodRow
from xattn_video.pipelines.video import write_video
from xattn_video.policy.schedule import ThresholdSchedule

ROOT = Path(__file__).parents[1]
SMALL = ["--height=64", "--width=64", "--num-frames=9", "--num-inference-steps=3"]
HERE = ["--device=cpu", "--dtype=float32"]
SPARSE = ["--block-size=16", "--min-tokens=0", "--warmup-steps=1"]
PROMPT = "--prompt=a red circle"


@pytest.fixture
def compare(tiny_pipeline, tmp_path, monkeypatch):
    """Run `compare` on the tiny pipeline within an empty folder."""
    monkeypatch.chdir(tmp_path)

    def run_compare(*arguments: object) -> tuple[int, str, str]:
        generating = ["--model", tiny_pipeline, *SMALL, *HERE, *SPARSE]
        existing = any(str(argument).startswith("--candidate") for argument in arguments)
        return run_cli("compare", *([] if existing else generating), *arguments)

    return run_compare


def write_clip(path: Path, num_frames: int = 5, width: int = 32, fps: int = 24) -> Path:
    generator = np.random.default_rng(num_frames)
    write_video(path, generator.integers(0, 256, (num_frames, 32, width, 3), np.uint8), fps)
    return path


def test_a_comparison_writes_tables_plots_and_videos(compare, tmp_path):
    code, out, err = compare(PROMPT, "--thresholds=0.3,0.6", "--strides=8,16", "--output=o")
    assert code == 0, err
    record = json.loads((tmp_path / "o/results.json").read_text())
    names = [row["method"]["name"] for row in record["rows"]]
    assert names == [
        "dense",
        "dense-again",
        "tau0.3-warmup1-stride8",
        "tau0.6-warmup1-stride8",
        "tau0.3-warmup1-stride16",
        "tau0.6-warmup1-stride16",
    ]
    dense, again, low, high = record["rows"][:4]
    assert dense["psnr"] is None
    assert again["identical"]
    assert again["ssim"] == 1
    assert again["latent_error"] == 0
    assert low["density"] < high["density"] < 1
    assert low["kept_mass"] < high["kept_mass"]
    assert low["latent_error"] > 0
    assert low["psnr"] < 100
    assert low["speedup"] > 0
    assert low["checks_right"] is None
    assert len(record["layer_densities"]["tau0.3-warmup1-stride8"]) == 3
    assert record["layer_densities"]["tau0.3-warmup1-stride8"][0][0] is None
    assert record["video_tokens"] == 48
    assert set(record["versions"]) - {"triton"} == {"xattn_video", "torch", "diffusers"}
    for row in ("dense again", "tau 0.6, warm-up 1, stride 16"):
        assert row in out
        assert row in (tmp_path / "o/results.md").read_text()
    assert sorted(path.name for path in (tmp_path / "o").glob("*.png")) == [
        "plot-density-layers.png",
        "plot-psnr-density.png",
        "plot-psnr-grid.png",
    ]
    files = [tmp_path / "o" / file for video in record["videos"] for file in video["files"]]
    assert len(files) == 6 + 4
    assert {read_clip(file).codec for file in files if file.suffix == ".mkv"} == {"ffv1"}
    page = (tmp_path / "o/results.html").read_text()
    assert page.count('<div class="player"') == 4
    assert page.count('<div class="map"') == 4
    assert "a red circle (seed 0), tau 0.3, warm-up 1, stride 16" in page
    assert page.count("data:image/png") == 2
    side = read_clip(next(file for file in files if file.suffix == ".mp4"))
    assert side.frames.shape == (9, 64 + 24, 3 * 64 + 8, 3)


def test_the_model_is_loaded_once_and_every_reference_made_once(compare, monkeypatch, tmp_path):
    from xattn_video.measure import comparison
    from xattn_video.pipelines import loading

    loads, calls = [], []
    load, generate = loading.load_pipeline, comparison.generate_together
    monkeypatch.setattr(loading, "load_pipeline", lambda options: loads.append(1) or load(options))

    def count(pipe, requests, on_step=None):
        calls.append((len(requests), requests[0].sparse))
        return generate(pipe, requests, on_step)

    monkeypatch.setattr(comparison, "generate_together", count)
    (tmp_path / "p.txt").write_text("a red circle\na blue square\n")
    code, _, err = compare(
        "--prompts-file=p.txt",
        "--seeds=0,1",
        "--batch-size=3",
        "--thresholds=0.3,0.6",
        "--no-noise-ceiling",
        "--no-kept-mass",
        "--no-videos",
    )
    assert code == 0, err
    assert len(loads) == 1
    warm_up, timed = calls[:2], calls[2:]
    assert [size for size, _ in warm_up] == [3, 3]
    assert [size for size, _ in timed] == [3, 3, 3, 1, 1, 1]
    assert [sparse is None for _, sparse in timed] == [True, False, False] * 2
    record = json.loads((tmp_path / "compare/results.json").read_text())
    assert [row["num_videos"] for row in record["rows"]] == [4, 4, 4]
    assert [(video["prompt"], video["seed"]) for video in record["videos"][:3]] == [
        ("a red circle", 0),
        ("a red circle", 1),
        ("a blue square", 0),
    ]
    assert record["num_prompts"] == 2


def test_no_videos_needs_no_ffmpeg(tiny_pipeline, tmp_path):
    code = f"""
import sys
for name in ("imageio", "imageio_ffmpeg"):
    sys.modules[name] = None
from xattn_video.cli import app
app({["compare", "--model", str(tiny_pipeline), *SMALL, *HERE, *SPARSE, PROMPT]!r}
    + ["--no-videos", "--thresholds=0.4", "--output", {str(tmp_path / "o")!r}])
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "VMAF is not measured: it needs ffmpeg, which was not used in this run." in done.stderr
    assert not (tmp_path / "o/videos").exists()
    assert "<video" not in (tmp_path / "o/results.html").read_text()
    assert json.loads((tmp_path / "o/results.json").read_text())["missing"]["VMAF"]


def test_a_run_cut_short_leaves_what_it_did(compare, monkeypatch, tmp_path):
    from xattn_video.measure import comparison

    generate = comparison.generate_together

    def fail_at_last(pipe, requests, on_step=None):
        sparse = requests[0].sparse
        if sparse is not None and sparse.warmup_steps and sparse.threshold == 0.6:
            raise RuntimeError("CUDA out of memory")
        return generate(pipe, requests, on_step)

    monkeypatch.setattr(comparison, "generate_together", fail_at_last)
    code, _, err = compare(PROMPT, "--thresholds=0.3,0.6", "--no-videos", "--no-kept-mass")
    assert code == 1
    assert "failed: 1/1 a red circle: RuntimeError: CUDA out of memory" in err
    assert "error: 1 of 1 videos failed, as listed above and in compare/resume/failures" in err
    record = json.loads((tmp_path / "compare/results.json").read_text())
    assert [row["method"]["name"] for row in record["rows"]][-1] == "tau0.3-warmup1-stride8"


def test_whole_settings_are_compared_alone_or_beside_a_grid():
    def names(**values):
        given = {"noise_ceiling": False, "model": "demo", "warmup_steps": "4", "strides": "8"}
        given = dict.fromkeys(GRID.options) | given | values
        return [method.name for method in GRID.make(given)]

    preset, other = "preset=fast", "density=0.2,token-order=hilbert,mask_every=4"
    alone = names(setting=[preset, other])
    assert alone == [
        "density0.05-warmup4-stride8-hilbert-firstorder-refresh15",
        "density0.2-warmup4-stride8-hilbert-mask4",
    ]
    assert names(thresholds="0.9", setting=[other])[0] == "tau0.9-warmup4-stride8"
    assert len(names(thresholds="0.9", setting=[other])) == 2


def test_settings_of_one_name_are_told_apart():
    def labels(*settings):
        given = {"noise_ceiling": False, "model": "demo", "warmup_steps": "4", "strides": "8"}
        given = dict.fromkeys(GRID.options) | given | {"setting": list(settings)}
        methods = GRID.make(given)
        assert len({method.name for method in methods}) == len(methods)
        return [method.label for method in methods]

    small = "density=0.2,block_size=64"
    assert labels(small) == ["density 0.2, warm-up 4, stride 8"]
    assert labels("density=0.2", small, "density=0.3", "density=0.2", "density=0.20") == [
        "density 0.2, warm-up 4, stride 8, block size 128",
        "density 0.2, warm-up 4, stride 8, block size 64",
        "density 0.3, warm-up 4, stride 8",
    ]
    assert labels(f"{small},cooldown_steps=2", small)[0].endswith("stride 8, cooldown steps 2")


def test_a_schedule_is_compared_beside_the_thresholds_and_resumed(compare, tmp_path):
    ThresholdSchedule.linear(0.4, 0.9, 3).save(tmp_path / "s.json")
    settings = (PROMPT, "--schedule=s.json", "--threshold=0.3", "--no-videos", "--no-kept-mass")
    code, out, err = compare(*settings, "--no-noise-ceiling")
    assert code == 0, err
    record = json.loads((tmp_path / "compare/results.json").read_text())
    assert [row["method"]["label"] for row in record["rows"]] == [
        "dense",
        "tau 0.3, warm-up 1, stride 8",
        "schedule, warm-up 1, stride 8",
    ]
    row = MethodRow.from_dict(record["rows"][2])
    assert row.method.sparse.schedule == ThresholdSchedule.linear(0.4, 0.9, 3)
    assert (tmp_path / "compare/plot-psnr-density.png").exists()
    assert max(map(len, out.splitlines())) <= 80
    assert compare(*settings, "--no-noise-ceiling")[0] == 0


def test_compare_knows_every_setting_of_generate():
    known = {
        name
        for parameter in get_command(app).commands["compare"].params
        for name in parameter.opts
    }
    generate = {
        name
        for parameter in get_command(app).commands["generate"].params
        for name in parameter.opts
    }
    # Every video is compared with dense; reports and plots are in the folder of the results; a
    # preset is one of several settings, --setting preset=fast; it runs as one process.
    assert generate - known == {"--dense", "--report", "--plot", "--preset", "--parallel"}


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give --prompt, --prompts-file or --demo-prompts, got none"),
        ([PROMPT, "--prompts-file=p.txt"], "give --prompt or --prompts-file, got both"),
        (
            [PROMPT, "--demo-prompts=4"],
            "--demo-prompts cannot be combined with --prompt or --prompts-file",
        ),
        (["--demo-prompts=4"], "--demo-prompts needs --model demo, got "),
        ([PROMPT, "--thresholds=0.9;0.95"], "--thresholds must be numbers separated by commas"),
        ([PROMPT, "--thresholds="], "--thresholds must be numbers separated by commas, got ''"),
        ([PROMPT, "--thresholds=0.9,2"], "--thresholds must lie in (0, 1], got 2.0"),
        ([PROMPT, "--warmup-steps=1.5"], "--warmup-steps must be whole numbers"),
        ([PROMPT, "--setting=speed=2"], "a setting must be NAME=VALUE,... with the names preset,"),
        ([PROMPT, "--setting=density"], "got 'density'"),
        ([PROMPT, "--setting=preset=best"], "preset must be one of quality, balanced, fast"),
        ([PROMPT, "--setting=preset=fast,density=0.3"], "sets threshold, density,"),
        ([PROMPT, "--setting=density=2"], "density must lie in (0, 1], got 2"),
        ([PROMPT, "--warmup-steps=-1"], "--warmup-steps must be at least 0, got -1"),
        ([PROMPT, "--strides=8,12"], "--strides must divide --block-size, got --strides=12"),
        ([PROMPT, "--seeds=a"], "--seeds must be whole numbers separated by commas, got 'a'"),
        ([PROMPT, "--seeds=-1"], "--seeds must lie between 0 and 2**63 - 1, got -1"),
        ([PROMPT, "--seeds=1,1"], "--seeds must be different numbers, got 1 more than once in"),
        (
            [PROMPT, "--thresholds=0.9,0.90"],
            "--thresholds must be different numbers, got 0.9",
        ),
        ([PROMPT, "--fps=0"], "--fps must lie between 1 and 240, got 0"),
        ([PROMPT, "--fps=1000000"], "--fps must lie between 1 and 240, got 1000000; use 24"),
        (
            [PROMPT, "--true-cfg-scale=0"],
            "--true-cfg-scale must be a finite number of at least 1, ",
        ),
        ([PROMPT, "--schedule=no.json"], "cannot read the schedule 'no.json': No such file"),
        ([PROMPT, "--batch-size=0"], "--batch-size must be at least 1, got 0"),
        ([PROMPT, "--backend=fast"], "unknown attention backend 'fast'"),
        ([PROMPT, "--output=/proc/a"], "--output cannot be written to '/proc/a'"),
        ([PROMPT, "--output=done"], "'done' already holds results.json; choose another --output"),
        ([PROMPT, "--open", "--no-html"], "--open and --no-html cannot be combined"),
        (
            ["--reference=a.mkv", "--candidate=a.mkv", "--open"],
            "--open shows the page in the --output folder",
        ),
        (
            ["--reference=a.mkv"],
            "--reference and --candidate must be given together; give --candidate too",
        ),
        (
            ["--candidate=a.mkv"],
            "--reference and --candidate must be given together; give --reference too",
        ),
        (
            ["--reference=a.mkv", "--candidate=a.mkv", PROMPT],
            "compare existing files and generate nothing; leave out --prompt, or the files.",
        ),
        (
            ["--reference=a.mkv", "--candidate=a.mkv", "--thresholds=0.9", "--no-kept-mass"],
            "leave out --thresholds, --kept-mass, or the files.",
        ),
        (["--reference=a.mkv", "--candidate=no.mkv"], "there is no video 'no.mkv'"),
        (["--reference=a.mkv", "--candidate=p.txt"], "cannot read 'p.txt' as a video"),
        (["--reference=a.mkv", "--candidate=long.mkv"], "the videos differ in frames 5 and 9"),
        (["--reference=a.mkv", "--candidate=wide.mkv"], "differ in size 32x32 and 64x32"),
        (["--reference=a.mkv", "--candidate=slow.mkv"], "the videos differ in fps 24 and 12"),
        (
            ["--reference=a.mkv", "--candidate=a.mkv", "--output=done"],
            "'done' already holds results.json",
        ),
    ],
    ids=lambda value: " ".join(value)[:60] if isinstance(value, list) else "",
)
def test_bad_arguments_are_one_line_and_exit_code_2(arguments, message, compare, tmp_path):
    (tmp_path / "p.txt").write_text("a red circle\n")
    (tmp_path / "done").mkdir()
    (tmp_path / "done/results.json").touch()
    if any("candidate=" in argument for argument in arguments):
        write_clip(tmp_path / "a.mkv")
        write_clip(tmp_path / "long.mkv", num_frames=9)
        write_clip(tmp_path / "wide.mkv", width=64)
        write_clip(tmp_path / "slow.mkv", fps=12)
    code, out, err = compare(*arguments)
    assert code == 2, err
    assert out == ""
    assert err.startswith("error: ")
    assert message in err
    assert err.count("\n") == 1


@pytest.mark.usefixtures("no_model")
def test_without_ffmpeg_it_stops_before_the_model_is_loaded(compare, monkeypatch):
    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", None)
    code, _, err = compare(PROMPT)
    assert code == 2
    assert "videos need ffmpeg" in err
    assert "--no-videos" in err


@pytest.mark.usefixtures("no_model")
def test_without_torchmetrics_it_stops_before_the_model_is_loaded(compare, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchmetrics.functional.image", None)
    code, _, err = compare(PROMPT, "--no-videos")
    assert code == 2
    assert "pip install torchmetrics" in err


@pytest.mark.usefixtures("no_model")
def test_all_packages_that_are_missing_are_named_at_once(compare, monkeypatch):
    for name in ("torchmetrics", "matplotlib"):
        monkeypatch.setitem(sys.modules, name, None)
    code, _, err = compare(PROMPT, "--no-videos")
    assert code == 2
    assert err == (
        "error: comparisons need torchmetrics and matplotlib, which are not installed; "
        "pip install torchmetrics matplotlib.\n"
    )


def test_two_files(tmp_path):
    reference, candidate = write_clip(tmp_path / "a.mkv"), tmp_path / "b.mkv"
    frames = read_clip(reference).frames.copy()
    frames[1:] //= 2
    write_video(candidate, frames, 24)
    code, out, err = run_cli(
        "compare", "--reference", reference, "--candidate", candidate, "--output", tmp_path / "o"
    )
    assert code == 0, err
    assert "frames     5, 1 identical" in out
    assert "PSNR" in out
    record = json.loads((tmp_path / "o/results.json").read_text())
    assert record["num_identical"] == 1
    assert record["lowest_psnr"] < record["psnr"]
    assert (tmp_path / "o/side-by-side.mp4").exists()
    page = (tmp_path / "o/results.html").read_text()
    assert "difference, 4 times as bright" in page
    assert "5, 1 identical" in page


def test_json_of_two_files_names_the_results_that_are_written(tmp_path):
    clip = write_clip(tmp_path / "a.mkv")
    words = ("compare", "--reference", clip, "--candidate", clip, "--json")
    for more, results in (((), None), (("--output", tmp_path / "o"), str(tmp_path / "o"))):
        code, out, err = run_cli(*words, *more)
        assert code == 0, err
        assert json.loads(out).get("results") == results


def test_files_that_lost_detail_are_warned_of(tmp_path):
    reference, candidate = write_clip(tmp_path / "a.mkv"), write_clip(tmp_path / "a.mp4")
    code, _, err = run_cli("compare", "--reference", reference, "--candidate", candidate)
    assert code == 0, err
    assert "is h264, which loses detail" in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.mkv", "a.mp4"]
