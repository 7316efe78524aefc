"""What `xattn-video generate` writes and says."""

import json
import re
import subprocess
import sys
from pathlib import Path

import imageio.v3 as imageio
import pytest
import torch
from command_line import SMALL, SPARSE, run_cli

from xattn_video.measure.demo_checks import ATTRIBUTES, score_clip
from xattn_video.pipelines.demo import parse_prompt
from xattn_video.pipelines.request import VideoSettings
from xattn_video.policy.settings import SparseSettings

ROOT = Path(__file__).parents[1]


def test_a_video_with_its_report_and_plot(generate, tmp_path):
    code, out, err = generate(
        "--prompt=a red circle",
        *SPARSE,
        "--output=new/a.mp4",
        "--report=new/run.json",
        "--plot=new/run.png",
        "--html=new/run.html",
    )
    assert code == 0, err
    page = (tmp_path / "new/run.html").read_text()
    assert "<h1>a red circle</h1>" in page
    assert page.count('<div class="player"') == 1
    assert "Step 1, layer 2: dense, warm-up" in page
    assert "Step 3, layer 2: density 0." in page
    assert re.search(r"^page +new/run\.html$", out, re.MULTILINE)
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
    assert re.search(r"^memory +\d+\.\d\d GiB at the peak$", out, re.MULTILINE)
    for text in ("new/a.mp4", "new/run.json", "new/run.png", "torch_gather", "2 dense steps of"):
        assert text in out
    line = r"^  step 2/4  dense  [\d.]+ s  over \d:\d\d:\d\d left$"
    assert re.search(line, err, re.MULTILINE), err
    assert re.search(r"^  step 4/4  sparse, density 0\.\d\d  [\d.]+ s  over ", err, re.MULTILINE)
    assert "\x1b" not in out + err


def test_a_plot_that_fails_leaves_the_old_one(generate, tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    def write_half(figure, path, **options):
        Path(path).write_text("half")
        raise OSError("the disk is full")

    monkeypatch.setattr(Figure, "savefig", write_half)
    (tmp_path / "run.png").write_text("old")
    code, _, err = generate("--prompt=a red circle", *SPARSE, "--plot=run.png")
    assert code == 1
    assert "error: cannot write 'run.png': the disk is full; the existing file" in err
    assert (tmp_path / "run.png").read_text() == "old"
    assert len(list(tmp_path.iterdir())) == 2


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
    code, _, err = generate("--prompt=a", *SPARSE, "--output=a.mp4", "--verbose")
    assert code == 0, err
    assert "attention backend 'torch_gather' chosen" in caplog.text


def test_prompts_beyond_the_demo_models_words_are_warned_of():
    from xattn_video.pipelines.run_checks import unknown_words

    known = "a red circle moving left to right over a blue background"
    (warning,) = unknown_words([known, "a cat", "a dog"])
    assert warning.startswith("the prompt is not in the demo model's grammar, got 'a cat'")
    assert unknown_words([known]) == []


@pytest.mark.parametrize(("side", "warned"), [(128, True), (256, False)])
def test_a_size_that_the_demo_model_was_not_trained_on_is_warned_of(side, warned):
    from xattn_video.pipelines.loading import LoadOptions
    from xattn_video.pipelines.request import GenerationRequest, VideoSettings
    from xattn_video.pipelines.run_checks import check_runs

    video = VideoSettings(height=side, width=side, num_frames=33)
    request = GenerationRequest("a", None, 0, video, sparse=None)
    warnings = check_runs(LoadOptions("demo", device="cpu"), [request])
    assert ("the demo model was trained on 256x256" in " ".join(warnings)) == warned


def test_a_prompt_that_comes_again_is_warned_of(generate, tmp_path):
    (tmp_path / "p.txt").write_text("a\nb\na\n")
    code, _, err = generate("--prompts-file=p.txt", "--dense")
    assert code == 0
    assert "warning: 1 prompt repeats an earlier one, and so will the video: " in err


def test_the_demo_tells_what_it_does_not_show(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    size = ["--height=32", "--width=32", "--num-frames=1", "--num-inference-steps=2"]
    words = ["generate", "--model=demo", "--prompt=a red circle", "--device=cpu", *size]
    code, out, err = run_cli(*words, "--warmup-steps=1")
    assert code == 0, err
    assert "`xattn-video demo --open` compares a sparse video with a dense one" in out
    assert re.search(r"^full size +1\.\d\dx speed measured at full size; ", out, re.MULTILINE)
    sparse = ["--warmup-steps=0", "--density=0.1", "--refresh-every=2", "--compensation=means"]
    code, out, err = run_cli(*words, *sparse)
    assert code == 0, err
    assert re.search(r"^full size +1\.\d\dx speed expected at full size; ", out, re.MULTILINE)
    code, out, err = run_cli(*words, "--dense")
    assert code == 0, err
    assert "full size" not in out


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
        "--prompts-file=p.txt",
        *SPARSE,
        "--output=o",
        "--plot=plots",
        "--report=o/run.json",
        "--html=o/all.html",
    )
    assert code == 0, err
    stems = ["a-blue-ring-seed0", "a-red-circle-seed0"]
    assert sorted(path.stem for path in (tmp_path / "o").glob("*.mp4")) == stems
    assert sorted(path.stem for path in (tmp_path / "plots").glob("*.png")) == stems
    runs = json.loads((tmp_path / "o/run.json").read_text())["runs"]
    assert [video["prompt"] for video in runs] == ["a red circle", "a blue ring"]
    assert all(video["report"]["num_sparse_steps"] == 2 for video in runs)
    assert out.count("2/4 steps x 3/3 layers sparse") == 2
    page = (tmp_path / "o/all.html").read_text()
    assert "<h1>2 videos</h1>" in page
    assert page.count('<div class="player"') == page.count('<div class="map"') == 2


def test_many_prompts_load_the_model_once(generate, monkeypatch, tmp_path):
    from xattn_video.pipelines import loading

    loads, load = [], loading.load_pipeline
    monkeypatch.setattr(
        loading, "load_pipeline", lambda options: loads.append(options) or load(options)
    )
    (tmp_path / "p.txt").write_text("a red circle\na blue ring\n")
    code, _, err = generate("--prompts-file=p.txt", "--dense", "--output=o")
    assert code == 0, err
    assert len(loads) == 1
    assert len(list((tmp_path / "o").glob("*.mp4"))) == 2


def test_the_model_is_hunyuan_video_unless_another_is_named(monkeypatch):
    jobs = []
    module = sys.modules["xattn_video.cli.generate"]
    monkeypatch.setattr(module, "check_job", jobs.append)
    monkeypatch.setattr(module, "run_job", lambda job: None)
    monkeypatch.setattr(module, "choose_outputs", lambda *arguments: None)
    code, _, err = run_cli("generate", "--prompt=a", "--device=cpu")
    assert code == 0, err
    assert jobs[0].load.model == "hunyuanvideo-community/HunyuanVideo"


@pytest.mark.parametrize(("model", "min_tokens"), [("demo", 0), ("org/hunyuan", None)])
def test_the_demo_is_sparse_however_few_its_tokens(model, min_tokens, monkeypatch):
    jobs = []
    module = sys.modules["xattn_video.cli.generate"]
    monkeypatch.setattr(module, "check_job", jobs.append)
    monkeypatch.setattr(module, "run_job", lambda job: None)
    code, _, err = run_cli("generate", f"--model={model}", "--prompt=a", "--device=cpu")
    assert code == 0, err
    assert jobs[0].requests[0].sparse.min_tokens == min_tokens


def test_every_option_of_the_video_and_the_model_arrives(generate, monkeypatch):
    """Seen from what is handed on: most change nothing that a tiny video shows."""
    jobs = []
    # Its module: the name in xattn_video.cli is the function.
    module = sys.modules["xattn_video.cli.generate"]
    monkeypatch.setattr(module, "check_job", jobs.append)
    monkeypatch.setattr(module, "run_job", lambda job: None)
    code, _, err = generate(
        "--prompt=a",
        "--guidance-scale=5",
        "--true-cfg-scale=3",
        "--negative-prompt=blur",
        "--seed=7",
        "--fps=12",
        "--threshold=0.8",
        "--stride=16",
        "--block-size=64",
        "--warmup-steps=1",
        "--cooldown-steps=2",
        "--min-tokens=3",
        "--backend=torch_gather",
        "--offload=none",
        "--vae-tiling",
        "--attention-backend=native",
    )
    assert code == 0, err
    (job,) = jobs
    (request,) = job.requests
    assert request.video == VideoSettings(64, 64, 9, 4, 5.0, 3.0)
    assert (request.negative_prompt, request.seed, job.fps) == ("blur", 7, 12)
    assert request.sparse == SparseSettings(
        0.8,
        stride=16,
        block_size=64,
        warmup_steps=1,
        cooldown_steps=2,
        min_tokens=3,
        backend="torch_gather",
    )
    assert (job.load.offload, job.load.vae_tiling) == ("none", True)
    assert job.load.attention_backend == "native"
    assert (job.load.device, job.load.dtype) == ("cpu", torch.float32)


def test_the_file_plays_at_the_frame_rate_asked_for(generate, tmp_path):
    code, _, err = generate("--prompt=a", "--dense", "--fps=12", "--output=a.mp4")
    assert code == 0, err
    assert imageio.immeta(tmp_path / "a.mp4", plugin="FFMPEG")["fps"] == 12


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


def test_the_command_itself(tiny_pipeline, tmp_path):
    """A process of its own: entry point, quiet libraries, exit code."""
    command = [sys.executable, "-m", "xattn_video", "generate", "--model", str(tiny_pipeline)]
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
    code, out, err = run_cli("generate", "--model=demo", f"--prompt={prompt}", "--report=run.json")
    assert code == 0, err
    (video,) = json.loads((tmp_path / "run.json").read_text())["runs"]
    assert [step["sparse"] for step in video["steps"]] == [False] * 5 + [True] * 20
    assert "20/25 steps x" in out
    frames = imageio.imread(tmp_path / video["file"])
    assert frames.shape == (65, 256, 256, 3)
    seen = torch.from_numpy(frames).permute(0, 3, 1, 2) / 255
    right = score_clip(seen, parse_prompt(prompt))
    assert all(all(right[name]) for name in ATTRIBUTES), right
