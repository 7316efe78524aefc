"""Named settings."""

import re

import pytest

from xattn_video import XAttnProcessor
from xattn_video.policy.decision import Run, decide
from xattn_video.policy.presets import PRESETS, parse_setting, preset_settings
from xattn_video.policy.settings import SparseSettings


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_is_settings(preset):
    processor = XAttnProcessor.from_preset(preset, warmup_steps=2, residual="host")
    expected = SparseSettings(**PRESETS[preset], warmup_steps=2, residual="host")
    assert processor.settings == preset_settings(preset, warmup_steps=2, residual="host")
    assert processor.settings == expected


def test_the_default_stays_the_papers_method():
    settings = XAttnProcessor().settings
    assert settings == SparseSettings(0.95)
    assert (settings.token_order, settings.compensation) == ("raster", "none")
    assert (settings.mask_every, settings.refresh_every) == (1, None)


@pytest.mark.parametrize(
    ("preset", "options", "message"),
    [
        ("best", {}, "preset must be one of quality, balanced, fast, got 'best'"),
        (
            "fast",
            {"density": 0.3},
            "preset='fast' already sets threshold, density, .* got density too",
        ),
        ("fast", {"threshold": 0.9, "mask_every": 2}, "got threshold, mask_every too"),
        ("fast", {"stride": 7}, "stride must divide block_size"),
    ],
)
def test_what_contradicts_a_preset_is_refused(preset, options, message):
    with pytest.raises(ValueError, match=message):
        XAttnProcessor.from_preset(preset, **options)


def test_a_setting_that_names_something_twice_is_refused():
    with pytest.raises(ValueError, match="a setting must name mask_every once, got it twice"):
        parse_setting("mask_every=2,density=0.2,mask-every=3")


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_with_too_few_steps_says_what_to_give_in_its_place(preset):
    run = Run(num_layers=1, num_heads=1, num_video_tokens=9999, device_type="cpu", num_steps=8)
    others = {name: value for name, value in PRESETS[preset].items() if name != "refresh_every"}
    listed = ", ".join(f"{name}={value!r}" for name, value in others.items())
    message = f"lower it and give {listed} in place of preset='{preset}'"
    with pytest.raises(ValueError, match=re.escape(message)):
        decide(preset_settings(preset), 0, run)
    assert decide(SparseSettings(**others, refresh_every=8), 0, run).reason == "warm-up"


@pytest.mark.parametrize("text", ["density", "density=", "=0.2", "speed=2", "density=0.2,"])
def test_a_setting_that_names_nothing_is_refused(text):
    with pytest.raises(ValueError, match=r"a setting must be NAME=VALUE,\.\.\. with the names"):
        parse_setting(text)


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize("wanted", [["--preset=fast"], ["--compensation=means"]])
def test_a_backend_without_compensation_says_so_before_the_model_is_loaded(wanted, generate):
    code, _, err = generate("--prompt=a", "--backend=flex", *wanted)
    assert code == 2
    assert "'flex' cannot run this problem" in err
    assert "no log-sum-exp on a CPU, which compensation needs; use" in err
