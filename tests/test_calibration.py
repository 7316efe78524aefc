"""`xattn-video calibrate`: the errors it measures, how it shares blocks out, and its command."""

import contextlib
import itertools
import json
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from command_line import SMALL, run_cli
from full_disk import KINDS, no_room, small_disk
from hunyuan import HEADS, TEXT_TOKENS, VIDEO_TOKENS
from oracle import antidiagonal_block_scores, masked_attention

from xattn_video import ThresholdSchedule
from xattn_video.cli.calibrate import _print
from xattn_video.measure.calibration import (
    AttentionErrors,
    Calibration,
    LayerShares,
    SharePoint,
    allot,
    calibration_of,
    lower_hull,
    measured_steps,
)
from xattn_video.policy.decision import Decision
from xattn_video.policy.settings import SparseSettings
from xattn_video.processors import engine
from xattn_video.processors.layout import TokenLayout
from xattn_video.processors.recorder import AttendedLayer, ForwardPass

PLAIN = SparseSettings(density=0.25, stride=4, block_size=8, warmup_steps=1, min_tokens=0)
WORDS = ["--density=0.25", "--block-size=16", "--min-tokens=0", "--warmup-steps=1"]


def test_blocks_go_where_brute_force_puts_them():
    """At the cost of any choice, no choice of measured points has a smaller sum of errors."""
    draw = random.Random(0)
    for _ in range(20):
        curves = {}
        for head in range(3):
            falling = sorted((draw.random() for _ in range(3)), reverse=True)
            curves[0, head] = [
                SharePoint(n / 10, n / 10, error)
                for n, error in zip((1, 2, 4), falling, strict=True)
            ]
        choices = itertools.product(
            *([*points, SharePoint(1, 1, 0)] for points in curves.values())
        )
        for choice in choices:
            mean = sum(point.density for point in choice) / 3
            found = allot(curves, mean)
            assert sum(point.density for point in found.values()) / 3 == pytest.approx(mean)
            error = sum(point.error for point in found.values())
            assert error <= sum(point.error for point in choice) + 1e-12


def test_at_a_cost_that_points_can_have_it_takes_the_best_of_them():
    curves = {
        (0, 0): [SharePoint(0.1, 0.1, 8.0), SharePoint(0.2, 0.2, 1.0)],
        (0, 1): [SharePoint(0.1, 0.1, 3.0), SharePoint(0.2, 0.2, 2.0)],
        (1, 0): [SharePoint(0.1, 0.1, 5.0), SharePoint(0.2, 0.2, 2.0)],
    }
    shares = {head: point.share for head, point in allot(curves, 0.5 / 3).items()}
    assert shares == pytest.approx({(0, 0): 0.2, (0, 1): 0.1, (1, 0): 0.2})


def test_a_hull_leaves_out_what_lies_above_it():
    steep, above, worse = (SharePoint(n, n, e) for n, e in ((0.2, 1.0), (0.4, 0.9), (0.5, 1.5)))
    rounded, least = SharePoint(0.09, 0.1, 4.0), SharePoint(0.1, 0.1, 4.0)
    found = lower_hull([worse, above, steep, rounded, least])
    assert found == [least, steep, SharePoint(1.0, 1.0, 0.0)]


@pytest.mark.parametrize(
    ("options", "num_steps", "expected"),
    [
        # The last warm-up step chooses, and the last step of all is dense.
        ({"refresh_every": 15, "warmup_steps": 5}, 50, {4: (8, 13, 18), 19: (23, 28, 33)}),
        ({"refresh_every": 3, "warmup_steps": 0}, 5, {0: (1, 2)}),
        ({"refresh_every": 1}, 9, {}),
        ({"mask_every": 4, "warmup_steps": 2}, 6, {2: (3, 4, 5)}),
        ({"warmup_steps": 2, "cooldown_steps": 1}, 5, {2: (2,), 3: (3,)}),
        ({"warmup_steps": 0}, 51, {step: (step,) for step in range(0, 51, 10)}),
    ],
)
def test_it_measures_between_the_steps_that_choose(options, num_steps, expected):
    found = measured_steps(replace(PLAIN, **options), num_steps)
    assert {step: found[step] for step in expected} == expected
    assert len(found) == len(expected) + (num_steps == 50)


def layer_inputs(seed):
    generator = torch.Generator().manual_seed(seed)
    shape = (3, 1, VIDEO_TOKENS + TEXT_TOKENS, HEADS, 16)
    return torch.randn(shape, generator=generator).mul(2).unbind()


def observe(errors, tensors):
    """One forward pass with one layer, dense, then the end of the step."""
    layout = TokenLayout(VIDEO_TOKENS, TEXT_TOKENS, (10,), torch.device("cpu"), (3, 4, 4))
    dense = Decision("threshold 1", ((1.0, 1.0),), 1.0, (False,), (False,))
    operator = engine.sparse_attention
    forward = ForwardPass(SparseSettings(1.0), dense, layout, None, None, None, None, operator, ())
    errors(AttendedLayer("only", forward, *tensors, None))
    errors.step_ends(errors._step)


def by_loop(tensors, share, mask=None):
    """The video's part of the dense and the sparse output, and the mask, float64."""
    query, key, value = (tensor.transpose(1, 2) for tensor in tensors)
    lengths = torch.tensor([VIDEO_TOKENS + 10])
    if mask is None:
        scores = antidiagonal_block_scores(query, key, block_size=8, stride=4, key_lengths=lengths)
        mask = torch.zeros_like(scores, dtype=torch.bool)
        rows, columns = VIDEO_TOKENS // 8, -(-int(lengths) // 8)
        mask[..., VIDEO_TOKENS // 8 : columns] = True  # Text keys.
        for head, row in itertools.product(range(HEADS), range(rows)):
            wanted = int(share * columns + 0.5) - (columns - rows)
            best = scores[0, head, row, :rows].argsort(descending=True)[: max(wanted, 0)]
            mask[0, head, row, best] = True
        mask[..., rows:, :columns] = True  # Text queries.
    options = {"block_size": 8, "key_lengths": lengths}
    sparse = masked_attention(query, key, value, mask, **options)
    dense = masked_attention(query, key, value, torch.ones_like(mask), **options)
    return dense[:, :, :VIDEO_TOKENS], sparse[:, :, :VIDEO_TOKENS], mask


def relative_error(found, exact):
    return ((found - exact).square().sum((0, 2, 3)) / exact.square().sum((0, 2, 3))).tolist()


def test_the_errors_of_two_heads_are_those_of_plain_loops():
    errors = AttentionErrors(PLAIN, ["only"], 3)
    tensors = [layer_inputs(seed) for seed in range(3)]
    for step_tensors in tensors:
        observe(errors, step_tensors)
    for head, points in errors.curves.items():
        assert [point.share for point in points] == list(errors.shares)
        for point in points:
            # Steps 1 and 2: the warm-up is not measured.
            found = [by_loop(one, point.share) for one in tensors[1:]]
            expected = [relative_error(sparse, dense)[head[1]] for dense, sparse, _ in found]
            kept = [mask[0, head[1]].double().mean().item() for _, _, mask in found]
            assert point.error == pytest.approx(sum(expected) / 2, rel=1e-4)
            assert point.density == pytest.approx(sum(kept) / 2)
    assert len(errors.curves) == HEADS


def test_with_refreshes_the_error_is_that_of_a_stale_residual_and_its_blocks():
    settings = replace(PLAIN, refresh_every=2)
    errors = AttentionErrors(settings, ["only"], 4)
    tensors = [layer_inputs(seed) for seed in range(3)]
    for step_tensors in tensors:
        observe(errors, step_tensors)
    for (_, head), points in errors.curves.items():
        for point in points:
            dense, sparse, mask = by_loop(tensors[0], point.share)
            dense_now, sparse_now, _ = by_loop(tensors[1], point.share, mask)
            expected = relative_error(sparse_now + dense - sparse, dense_now)[head]
            # The residual has 8 bits.
            assert point.error == pytest.approx(expected, rel=2e-2)


def test_an_order_of_tokens_is_that_of_a_sparse_run():
    """On the curve the blocks are others, and so are their errors."""
    tensors = layer_inputs(0)
    layout = TokenLayout(VIDEO_TOKENS, TEXT_TOKENS, (10,), torch.device("cpu"), (3, 4, 4))
    ordered = tuple(map(layout.along_hilbert_curve().to_canonical, tensors))
    errors = AttentionErrors(replace(PLAIN, warmup_steps=0, token_order="hilbert"), ["only"], 1)
    observe(errors, tensors)
    for (_, head), points in errors.curves.items():
        for point in points:
            dense, sparse, _ = by_loop(ordered, point.share)
            assert point.error == pytest.approx(relative_error(sparse, dense)[head], rel=1e-4)


def test_a_calibration_costs_what_uniform_densities_do():
    curves = {
        (layer, head): [
            SharePoint(0.05, 0.1, (layer + 1) ** 3 * 4.0),
            SharePoint(0.1, 0.15, (layer + 1) ** 3 * 2.0),
            SharePoint(0.2, 0.25, (layer + 1) ** 3 * 1.0),
        ]
        for layer in range(3)
        for head in range(2)
    }
    found = calibration_of(curves, 0.1, ["a", "b", "c"])
    assert (found.density, found.uniform_error) == (pytest.approx(0.15), 24.0)
    assert found.calibrated_error < found.uniform_error
    assert found.schedule.kind == "density"
    assert found.schedule.threshold(0) == 0.1
    assert [layer.layer for layer in found.layers] == ["a", "b", "c"]
    assert found.layers[0].largest < found.layers[2].least


@pytest.fixture
def calibrate(tiny_pipeline, tmp_path, monkeypatch):
    """Run `calibrate` on the tiny pipeline within an empty folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p.txt").write_text("a red circle\na blue square\n")

    def run_calibrate(*words: object) -> tuple[int, str, str]:
        return run_cli("calibrate", "--model", tiny_pipeline, *SMALL, *words)

    return run_calibrate


def test_the_file_drives_generate_and_compare_at_the_wanted_density(
    calibrate, generate, tiny_pipeline, tmp_path
):
    code, out, err = calibrate(*WORDS, "--prompts-file=p.txt", "--output=d.json", "-q", "--json")
    assert code == 0, err
    assert all(line.startswith("warning: ") for line in err.splitlines())
    found = json.loads(out)
    assert found["calibrated_error"] <= found["uniform_error"]
    assert found["prompts"] == ["a red circle", "a blue square"]
    assert found["sparse"]["density"] == 0.25
    assert (found["output"], found["replaced"]) == ("d.json", False)
    assert len(found["layers"]) == 3
    schedule = ThresholdSchedule.load(tmp_path / "d.json")
    assert (schedule.kind, len(schedule.heads)) == ("density", 3 * HEADS)
    densities = {}
    for name, words in {"uniform": WORDS, "by head": [*WORDS[1:], "--schedule=d.json"]}.items():
        code, _, err = generate("--prompt=a", *words, "--report=run.json", "--output=a.mp4")
        assert code == 0, err
        (video,) = json.loads((tmp_path / "run.json").read_text())["runs"]
        densities[name] = video["report"]["density"]
    # A block of one row of one head is the least that can differ.
    assert densities["by head"] == pytest.approx(densities["uniform"], abs=0.04)
    assert densities["uniform"] == pytest.approx(found["density"])
    words = (*SMALL, *WORDS[1:], "--prompt=a", "--no-videos", "--no-kept-mass", "--output=c")
    words = (*words, "--no-noise-ceiling", "--setting=density=d.json", "--setting=density=0.25")
    code, _, err = run_cli("compare", "--model", tiny_pipeline, *words)
    assert code == 0, err
    rows = json.loads((tmp_path / "c/results.json").read_text())["rows"]
    assert [row["method"]["label"].split()[0] for row in rows] == ["dense", "densities", "density"]
    assert rows[1]["density"] == pytest.approx(densities["by head"])


def test_it_says_what_it_found(calibrate, tmp_path):
    (tmp_path / "d.json").write_text("old")
    code, out, err = calibrate(
        *WORDS, "--refresh-every=2", "--prompts-file=p.txt", "--output=d.json"
    )
    assert code == 0, err
    lines = out.splitlines()
    assert lines[0].split() == ["layer", "least", "density", "largest", "density"]
    assert [line.split()[0] for line in lines[4:]] == ["density", "error", "densities"]
    assert "d.json (replaced); for --schedule" in lines[6]
    assert "1/2 a red circle" in err
    # A preset's density is the wanted one where none is given.
    words = ("--num-inference-steps=20", "--block-size=16", "--min-tokens=0", "--output=e.json")
    (tmp_path / "e.json").write_text("old")
    code, out, err = calibrate("--preset=quality", *words, "--prompt=a", "-q", "--json")
    assert code == 0, err
    assert json.loads(out)["replaced"]
    assert ThresholdSchedule.load(tmp_path / "e.json").threshold(0) == 0.15


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--density=0"], "--density must lie in (0, 1], got 0.0"),
        (["--density=1"], "--density must be below 1"),
        ([], "give --density or --preset, got none"),
        (["--density=0.2", "--prompt=b"], "give --prompt or --prompts-file, got both"),
        (["--density=0.2", "--output=d.txt"], "--output must end in .json"),
        (["--density=0.2", "--output=/proc/d.json"], "--output cannot be written to '/proc'"),
        (["--density=0.2", "--warmup-steps=9", "--min-tokens=0"], "No step is sparse"),
        (["--density=0.2", "--min-tokens=99"], "No step is sparse: 48 video tokens are fewer"),
        (
            ["--density=0.2", "--refresh-every=1", "--min-tokens=0", "--warmup-steps=1"],
            "no step runs sparse between refreshes",
        ),
    ],
)
def test_what_it_cannot_do_is_refused_before_the_model_is_loaded(words, message, calibrate):
    code, out, err = calibrate(
        "--block-size=16", "--prompts-file=p.txt", "--output=d.json", *words
    )
    assert (code, out) == (2, ""), err
    assert message in err
    assert err.startswith("error: ")


@pytest.mark.usefixtures("no_model")
def test_an_empty_prompts_file_is_refused(calibrate, tmp_path):
    (tmp_path / "p.txt").write_text("# none\n")
    code, _, err = calibrate(*WORDS, "--prompts-file=p.txt", "--output=d.json")
    assert (code, "contains no prompt" in err) == (2, True), err


@pytest.mark.parametrize("kind", KINDS)
def test_on_a_full_disk_it_fails_and_leaves_the_old_file(kind, calibrate, tmp_path, monkeypatch):
    from xattn_video.measure import calibration

    find = calibration.calibrate
    with small_disk(kind, tmp_path / "disk") as folder, contextlib.ExitStack() as full:

        def find_and_fill(*arguments):
            found = find(*arguments)
            full.enter_context(no_room(kind, folder))
            return found

        monkeypatch.setattr(calibration, "calibrate", find_and_fill)
        path = folder / "d.json"
        path.write_text("old")
        code, out, err = calibrate(*WORDS, "--prompt=a", f"--output={path}")
        full.close()
        assert (code, out) == (1, "")
        assert err.splitlines()[-1].startswith(f"error: cannot write {str(path)!r}: ")
        assert [(file.name, file.read_text()) for file in folder.iterdir()] == [("d.json", "old")]


@pytest.mark.parametrize(
    ("uniform", "calibrated", "warns"), [(0.2, 0.1, False), (0.2, 0.2, True), (0.0, 0.0, True)]
)
def test_densities_that_gain_nothing_are_said_to(uniform, calibrated, warns, capsys):
    schedule = ThresholdSchedule(((0, 0.1),), kind="density")
    layers = (LayerShares("a", 0.1, 0.1),)
    _print(Calibration(schedule, 0.1, uniform, calibrated, layers), Path("d.json"))
    out, err = capsys.readouterr()
    assert f"{uniform:.3g} uniform, {calibrated:.3g} calibrated" in " ".join(out.split())
    assert ("gain nothing here" in err) == warns
