"""Densities by layer and head: their file, the settings that hold them, and what runs."""

import json
from dataclasses import replace

import pytest
from command_line import SMALL, run_cli
from hunyuan import HEADS, NUM_LAYERS, run, with_processor

from xattn_video import ThresholdSchedule
from xattn_video.measure.methods import Method, method_of
from xattn_video.policy.decision import Run, decide, mean_density
from xattn_video.policy.presets import PRESETS, parse_setting, preset_settings
from xattn_video.policy.settings import SparseSettings

DENSITIES = ThresholdSchedule(
    ((0, 0.25),), layers={1: ((0, 1.0),)}, heads={(0, 1): ((0, 0.75),)}, kind="density"
)


def test_a_file_keeps_the_kind_and_says_nothing_of_thresholds(tmp_path):
    DENSITIES.save(tmp_path / "d.json")
    assert ThresholdSchedule.load(tmp_path / "d.json") == DENSITIES
    assert json.loads((tmp_path / "d.json").read_text())["kind"] == "density"
    assert "kind" not in ThresholdSchedule.constant(0.9).to_dict()
    with pytest.raises(ValueError, match="kind must be one of 'threshold', 'density', got 'tau'"):
        ThresholdSchedule.from_dict({"kind": "tau", "points": [[0, 0.9]]})


def test_settings_and_methods_survive_json():
    settings = SparseSettings(density=DENSITIES)
    assert SparseSettings.from_dict(json.loads(json.dumps(settings.to_dict()))) == settings
    method = method_of(settings)
    assert Method.from_dict(json.loads(json.dumps(method.to_dict()))) == method
    other = replace(DENSITIES, heads={(0, 1): ((0, 0.5),)})
    assert method_of(SparseSettings(density=other)).name != method.name


def test_a_schedule_is_given_as_what_it_holds():
    with pytest.raises(ValueError, match="threshold got a schedule of kind 'density'"):
        SparseSettings(DENSITIES)
    with pytest.raises(ValueError, match="density got a schedule of kind 'threshold'"):
        SparseSettings(density=ThresholdSchedule.constant(0.9))
    with pytest.raises(ValueError, match="density and threshold cannot be combined"):
        SparseSettings(0.9, density=DENSITIES)


def test_it_takes_the_place_of_a_presets_density(tmp_path):
    DENSITIES.save(tmp_path / "d.json")
    expected = SparseSettings(**PRESETS["balanced"] | {"density": DENSITIES})
    assert preset_settings("balanced", density=DENSITIES) == expected
    assert parse_setting(f"preset=balanced,density={tmp_path / 'd.json'}") == expected
    with pytest.raises(ValueError, match=r"cannot read the schedule 'no.json'"):
        parse_setting("density=no.json")


def test_layers_and_heads_keep_their_own_share():
    transformer, processor = with_processor(None, density=DENSITIES)
    run(transformer)
    (forward,) = processor.report().forwards
    assert forward.threshold is None
    assert forward.layers[1].reason == "density 1"
    first, second, third = (forward.layers[number].density for number in (0, 2, 3))
    assert second == third < first < 1


def test_the_mean_is_that_of_all_heads_over_the_sparse_steps():
    planned = Run(NUM_LAYERS, HEADS, 10**6, "cuda", 8)
    expected = (0.25 + 0.75 + 2 * 1 + 4 * 0.25) / 8
    assert mean_density(SparseSettings(density=DENSITIES), planned) == expected
    assert mean_density(SparseSettings(density=0.3), planned) == 0.3
    assert mean_density(SparseSettings(0.9), planned) is None
    rising = ThresholdSchedule(((0, 0.1), (6, 0.4)), kind="density")
    assert mean_density(SparseSettings(density=rising), planned) == pytest.approx(0.3)
    assert decide(SparseSettings(density=rising), 5, planned).thresholds[0][0] == 0.1


@pytest.mark.parametrize(
    ("preset", "refresh_every"),
    [([], None), (["--preset=balanced", "--num-inference-steps=18"], 15)],
)
def test_generate_takes_the_file_alone_and_with_a_preset(
    preset, refresh_every, generate, tmp_path
):
    replace(DENSITIES, layers={}).save(tmp_path / "d.json")
    words = ("--prompt=a", "--block-size=16", "--min-tokens=0", "--warmup-steps=1")
    words = (*words, "--schedule=d.json", "--report=run.json")
    code, _, err = generate(*words, *preset)
    assert code == 0, err
    (video,) = json.loads((tmp_path / "run.json").read_text())["runs"]
    assert video["sparse"]["threshold"] is None
    assert video["sparse"]["density"]["heads"] == {"0": {"1": [[0, 0.75]]}}
    assert video["sparse"]["refresh_every"] == refresh_every
    first, second, third = video["report"]["forwards"][1]["densities"]
    assert second == third < first < 1


def test_plan_takes_it_with_a_preset_and_prints_the_mean(tiny_pipeline, tmp_path):
    replace(DENSITIES, layers={}).save(tmp_path / "d.json")
    words = ("plan", "--model", tiny_pipeline, *SMALL, "--block-size=16", "--min-tokens=0")
    words = (*words, "--warmup-steps=1", f"--schedule={tmp_path / 'd.json'}", "--json")
    preset = "--preset=balanced"
    code, _, err = run_cli(*words, preset)
    assert (code, "--refresh-every must be at most" in err) == (2, True)
    code, out, err = run_cli(*words, preset, "--num-inference-steps=20")
    assert code == 0, err
    plan = json.loads(out)
    assert plan["refresh_steps"] == 1
    # Three layers of two heads: five keep 0.25, one 0.75.
    assert pytest.approx((5 * 0.25 + 0.75) / 6) in [b["density"] for b in plan["speedup_bounds"]]


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--density=0.2"], "--schedule and --density cannot be combined; give only one."),
        (["--threshold=0.9"], "--threshold and --schedule cannot be combined; give only one."),
        (["--preset=fast", "--dense"], "--schedule and --dense cannot be combined"),
    ],
)
def test_what_contradicts_it_is_refused(words, message, generate, tmp_path):
    DENSITIES.save(tmp_path / "d.json")
    code, _, err = generate("--prompt=a", "--schedule=d.json", *words)
    assert (code, message in err) == (2, True), err


@pytest.mark.usefixtures("no_model")
def test_thresholds_in_the_file_still_contradict_a_preset(generate, tmp_path):
    ThresholdSchedule.constant(0.9).save(tmp_path / "s.json")
    code, _, err = generate("--prompt=a", "--schedule=s.json", "--preset=fast")
    assert (code, "got one of thresholds; give only one" in err) == (2, True), err
