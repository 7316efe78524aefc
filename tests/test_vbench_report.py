"""Reports of runs whose scores are made up, so that every figure is known."""

import json
import os
import shutil
import sys

import diffusers
import pytest
import torch
from vbench_runs import SPARSE, invoke, make_run

from eval_vbench import report, report_plot
from eval_vbench.dimensions import dimensions, totals
from eval_vbench.report_page import report_page
from eval_vbench.report_web import report_web_page
from eval_vbench.run_comparison import CompleteRun, caveats, compare, load_run
from eval_vbench.run_folder import RunFolder
from eval_vbench.score_files import Score, scored_items, videos_digest, write_score_file
from xattn_video.pipelines.item_folder import settings_hash
from xattn_video.policy.schedule import ThresholdSchedule
from xattn_video.policy.settings import SparseSettings


@pytest.fixture(scope="module")
def made(tiny_pipeline, tmp_path_factory):
    """A dense run and a sparse one of two prompts; tests leave them as they are."""
    folder = tmp_path_factory.mktemp("made")
    assert make_run(folder / "dense", tiny_pipeline, "--dense")[0] == 0
    assert make_run(folder / "sparse", tiny_pipeline, *SPARSE)[0] == 0
    return folder


@pytest.fixture
def runs(made, tmp_path):
    """A copy that a test may change."""
    shutil.copytree(made, tmp_path / "runs")
    return tmp_path / "runs"


def give_scores(folder, dimension, value):
    """Score a run as VBench might have."""
    run = RunFolder(folder)
    items = scored_items(run, dimension)
    videos = {item.file_name: value for item in items}
    write_score_file(
        run.scores, Score(dimension, value, videos, videos_digest(run, items), "0.1.5")
    )


def make_report(runs, *arguments):
    """Exit code, stdout, stderr."""
    return invoke(
        report.app,
        f"--dense={runs / 'dense'}",
        f"--sparse={runs / 'sparse'}",
        f"--output={runs / 'report'}",
        *arguments,
    )


def test_a_report_holds_all_that_was_measured(runs):
    give_scores(runs / "dense", "temporal_flickering", 0.98)
    give_scores(runs / "sparse", "temporal_flickering", 0.95)
    code, page, messages = make_report(runs)
    assert code == 0, messages
    assert page.rstrip().endswith("report")
    assert make_report(runs)[1].rstrip().endswith("report (replaced)")
    values = json.loads((runs / "report/report.json").read_text())
    assert (runs / "report/report.md").read_text() in page
    assert (runs / "report/report.png").stat().st_size > 1000
    web_page = (runs / "report/report.html").read_text()
    assert web_page.count('<div class="player"') == 2
    assert "PSNR by frame: mean" in web_page
    assert "temporal_flickering" in web_page
    assert "data:image/png" in web_page
    assert "Not comparable to the VBench leaderboard" in web_page
    (sparse,) = values["sparse"]
    measures = sparse["measures"]
    assert 5 < measures["psnr"] < 100
    assert 0 < measures["ssim"] < 1
    assert 0 < measures["density"] < 1
    assert measures["speedup"] == pytest.approx(
        values["dense"]["measures"]["seconds"] / measures["seconds"]
    )
    (row,) = sparse["dimensions"]
    assert row["difference"]["pairs"] == 2
    assert row["difference"]["mean"] == pytest.approx(-0.03)
    assert sparse["totals"] is None
    assert set(sparse["checks"]) >= {"shape", "colour"}
    assert "| temporal_flickering | 2 | 0.9800 | 0.9500 | -0.0300 |" in page
    assert "15 of 16 dimensions were not scored for both runs, so there is no Quality" in page
    assert "LPIPS was not measured: AlexNet's weights were not found" in page
    assert "Not comparable to the VBench leaderboard: the prompts are the demo model's own" in page
    assert "The paper's figures" not in page
    assert f"Device: cpu; diffusers {diffusers.__version__}, torch {torch.__version__}" in page


def test_a_plot_does_not_outlive_its_report(runs, monkeypatch):
    plot = runs / "report/report.png"
    assert make_report(runs, "--no-fidelity")[0] == 0
    assert plot.exists()
    monkeypatch.setattr(report, "plot_report", lambda *_: False)
    assert make_report(runs, "--no-fidelity")[0] == 0
    assert not plot.exists()


def test_a_file_that_is_replaced_is_said(runs):
    (runs / "report").mkdir()
    (runs / "report/report.md").write_text("mine")
    code, out, err = make_report(runs, "--no-fidelity", "--json")
    assert code == 0, err
    assert json.loads(out)["sparse"]
    assert err == f"report     {runs / 'report'} (replaced)\n"


@pytest.mark.parametrize(
    ("device", "message"),
    [
        ("foo", "--device must be cpu, cuda or cuda:N, got 'foo'; use one of these."),
        ("cuda:99", "device 'cuda:99' does not exist: "),
    ],
)
def test_a_device_that_is_not_there_leaves_nothing(runs, device, message):
    code, _, err = make_report(runs, f"--device={device}")
    assert code == 2
    assert err.startswith(f"error: {message}")
    assert not (runs / "report").exists()


def test_what_was_measured_is_not_measured_again(runs, monkeypatch):
    assert make_report(runs)[0] == 0
    before = json.loads((runs / "report/report.json").read_text())

    def refuse(path):
        raise AssertionError("a video was read")

    monkeypatch.setattr("xattn_video.measure.clips.read_clip", refuse)
    assert make_report(runs)[0] == 0
    assert json.loads((runs / "report/report.json").read_text()) == before


def test_dense_against_dense_is_the_noise_ceiling(runs):
    shutil.copytree(runs / "dense", runs / "again")
    code, page, messages = invoke(
        report.app,
        f"--dense={runs / 'dense'}",
        f"--sparse={runs / 'again'}",
        f"--output={runs / 'report'}",
    )
    assert code == 0, messages
    assert "| dense (again) | 2 | 100.00 | 1.0000 |" in page


def test_a_score_of_other_videos_does_not_count(runs):
    give_scores(runs / "dense", "temporal_flickering", 0.98)
    give_scores(runs / "sparse", "temporal_flickering", 0.95)
    item_file = next((runs / "sparse/items").iterdir())
    item = json.loads(item_file.read_text())
    for name in item["files"]:
        item["files"][name]["sha256"] = "0" * 64
    item_file.write_text(json.dumps(item))
    _, page, _ = make_report(runs, "--no-fidelity")
    assert "16 of 16 dimensions were not scored" in page
    assert "PSNR, SSIM and LPIPS were not requested." in page


def test_other_settings_cannot_be_compared(runs, tiny_pipeline):
    shutil.rmtree(runs / "sparse")
    code, *_ = make_run(runs / "sparse", tiny_pipeline, *SPARSE, "--height=80", prompts=1)
    assert code == 0
    code, _, messages = make_report(runs)
    assert code == 2
    assert "cannot be compared, they differ in num_prompts 2 and 1; height 64 and 80;" in messages


def test_the_dense_run_must_be_dense(runs):
    (runs / "dense").rename(runs / "other")
    (runs / "sparse").rename(runs / "dense")
    (runs / "other").rename(runs / "sparse")
    code, _, messages = make_report(runs)
    assert code == 2
    assert "is sparse (tau 0.8, stride 8, warm-up 1); --dense takes a run that was" in messages


def test_missing_videos_are_named(runs):
    lost = min((runs / "sparse/videos").iterdir())
    lost.unlink()
    code, _, messages = make_report(runs)
    assert code == 2
    assert (
        f"lacks 1 of 2 videos (0 failed, 1 missing or changed), such as {lost.name!r}" in messages
    )
    assert "run eval_vbench.generate again" in messages


def test_a_broken_copy_is_named(runs):
    copy = runs / "sparse/lossless/0000-0.mkv"
    copy.write_bytes(bytes(copy.stat().st_size))
    code, _, messages = make_report(runs)
    assert (code, "1 missing or changed" in messages) == (2, True)
    # As if it were restored with an old date.
    os.utime(copy, (0, 0))
    code, _, messages = make_report(runs)
    assert code == 1
    assert f"cannot read '{copy}' as a video" in messages


def test_packages_that_are_missing_are_named_before_anything_is_measured(runs, monkeypatch):
    for name in ("torchmetrics", "matplotlib"):
        monkeypatch.setitem(sys.modules, name, None)
    code, _, err = make_report(runs)
    assert (code, err.count("\n")) == (2, 1)
    assert "pip install matplotlib torchmetrics." in err
    assert "pip install matplotlib." in make_report(runs, "--no-fidelity")[2]


@pytest.mark.parametrize("folder", ["videos", "items"])
def test_a_report_is_not_written_among_the_files_of_a_run(folder, runs):
    before = sorted(runs.rglob("*"))
    code, _, messages = make_report(runs, f"--output={runs / 'dense' / folder}")
    assert code == 2
    assert "holds the records of a run; use another." in messages
    assert sorted(runs.rglob("*")) == before


def test_no_run_and_the_same_run_are_refused(runs):
    code, _, messages = invoke(report.app, f"--dense={runs}", f"--sparse={runs / 'sparse'}")
    assert code == 2
    assert "is no run: it has no settings.json" in messages
    dense = f"--dense={runs / 'dense'}"
    code, _, messages = invoke(report.app, dense, f"--sparse={runs / 'dense'}")
    assert code == 2
    assert "a run is given twice" in messages


def test_sixteen_dimensions_have_totals(runs):
    highest = {name: dimension.highest for name, dimension in dimensions().items()}
    for name, value in highest.items():
        give_scores(runs / "dense", name, value)
        give_scores(runs / "sparse", name, value - 0.01)
    result = compare(load_run(RunFolder(runs / "dense")), load_run(RunFolder(runs / "sparse")), {})
    dense, sparse = result.totals
    assert dense.total == pytest.approx(1)
    assert sparse == totals({name: value - 0.01 for name, value in highest.items()})
    page = report_page(load_run(RunFolder(runs / "dense")), [result], [])
    assert "| **Total** |  | 1.0000 |" in page
    runs_shown = load_run(RunFolder(runs / "dense")), [result]
    text = report_web_page(*runs_shown, ["a note"], None, "a command", False).html()
    assert "<video" not in text
    assert ">Total</td>" in text
    assert "a note" in text
    assert "Quality, Semantic or Total" not in page


def rewrite_settings(folder, **changes):
    """Settings that the tiny pipeline cannot have."""
    file = folder / "settings.json"
    settings = json.loads(file.read_text())["settings"]
    for name, value in changes.items():
        if isinstance(value, dict):
            settings[name] = {**(settings[name] or {}), **value}
        else:
            settings[name] = value
    file.write_text(json.dumps({"hash": settings_hash(settings), "settings": settings}))


@pytest.fixture
def like_the_paper(runs):
    """Runs that claim the paper's settings; their videos are two tiny ones."""
    video = {"height": 720, "width": 1280, "num_frames": 129, "num_inference_steps": 50}
    sparse = {"threshold": 0.95, "warmup_steps": 5, "block_size": 128}
    rewrite_settings(runs / "dense", video=video)
    rewrite_settings(runs / "sparse", video=video, sparse=sparse)
    dense, result = (load_run(RunFolder(runs / name)) for name in ("dense", "sparse"))
    for run in (dense, result):
        run.settings.update(suite="gpt_enhanced", num_prompts=944)
    return dense, result


def test_the_papers_figures_stand_beside_measured_ones(like_the_paper):
    dense, sparse = like_the_paper
    pair = {"psnr": 20.0, "ssim": 0.75, "lpips": None, "vmaf": None}
    fidelity = {item.key: pair for item in dense.items}
    page = report_page(dense, [compare(dense, sparse, fidelity)], [])
    density = sum(record["density"] for record in sparse.records.values()) / 2
    assert f"| 0.95 | 23.5 | 20.0 | 0.822 | 0.750 | 0.155 | - | 45.5% | {density:.1%} |" in page
    assert "| 0.90 | 21.5 | - | 0.767 | - | 0.215 | - | 34.4% | - |" in page
    assert "`-`: not measured at the paper's settings" in page


def test_other_settings_than_the_papers_are_not_beside_it(like_the_paper):
    dense, sparse = like_the_paper
    sparse.settings["sparse"]["stride"] = 16
    page = report_page(dense, [compare(dense, sparse, {})], [])
    assert "| 0.95 | 23.5 | - | 0.822 | - | 0.155 | - | 45.5% | - |" in page


def test_five_seconds_are_too_long_for_vbench(like_the_paper):
    dense, _ = like_the_paper
    (leaderboard, length) = caveats(dense, [])
    assert "1 video for each prompt instead of 5" in leaderboard
    assert "129 frames at 24 fps are 5.38 s" in length
    assert "longer than 5 s" in length
    dense.settings["video"]["num_frames"] = 117
    assert len(caveats(dense, [])) == 1


def test_a_part_of_the_prompts_is_said(like_the_paper):
    dense, _ = like_the_paper
    dense.settings["num_prompts"] = 32
    assert "32 of 944 prompts" in caveats(dense, [])[0]


def test_speed_ups_are_dense_over_sparse_medians(like_the_paper):
    dense, sparse = like_the_paper
    for record in dense.records.values():
        record.update(seconds=30.0, seconds_per_dense_step=6.0)
    for record in sparse.records.values():
        record.update(seconds=20.0, seconds_per_dense_step=99.0, seconds_per_sparse_step=1.5)
    measures = compare(dense, sparse, {}).measures
    assert (measures.speedup, measures.step_speedup) == (1.5, 4.0)


def test_times_of_different_devices_are_not_compared(like_the_paper):
    dense, sparse = like_the_paper
    for record in sparse.records.values():
        record["device"] = "NVIDIA H100"
    result = compare(dense, sparse, {})
    assert result.measures.speedup is None
    assert "different devices (NVIDIA H100, cpu)" in caveats(dense, [result])[-1]


def test_the_plot_shows_small_differences(tmp_path, monkeypatch):
    """Three scores of 0.9977 are three bars of one height on an axis from 0 to 1."""
    drawn = []
    monkeypatch.setattr(report_plot, "write_figure", lambda path, figure: drawn.append(figure))
    scores = {"dense": {"a": 0.9977}, "tau 0.9": {"a": 0.9957}, "tau 0.8": {"a": 0.9997}}
    report_plot.draw_differences(tmp_path / "p.png", {"scores": scores})
    axes = drawn[0].axes[0]
    heights = [bars[0].get_height() for bars in axes.containers]
    assert heights == pytest.approx([-0.002, 0.002])
    low, high = axes.get_ylim()
    assert (high - low) < 0.02
    assert [label.get_text() for label in axes.get_xticklabels()] == ["a\ndense 0.9977"]


@pytest.mark.parametrize(
    ("settings", "share"),
    [
        (SparseSettings(0.9), "tau 0.9"),
        (SparseSettings(ThresholdSchedule.linear(0.8, 0.9, 5)), "tau schedule"),
        (SparseSettings(density=0.1), "density 0.1"),
        (
            SparseSettings(density=ThresholdSchedule(((0, 0.1),), kind="density")),
            "density schedule",
        ),
    ],
)
def test_a_run_is_named_by_what_decides_its_blocks(settings, share, tmp_path):
    run = CompleteRun(RunFolder(tmp_path), {"sparse": settings.to_dict()}, (), {}, {})
    assert run.label == f"{share}, stride 8, warm-up 5"


def test_several_ranks_are_refused(monkeypatch, tmp_path):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    code, _, err = invoke(report.app, f"--dense={tmp_path}", f"--sparse={tmp_path}")
    assert code == 2
    assert "runs as one process, got 2 ranks; start it without torchrun" in err
