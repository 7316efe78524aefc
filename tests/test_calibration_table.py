"""The table of calibrated shares on the page on fewer blocks."""

from benchmarks.calibration_table import section
from xattn_video import ThresholdSchedule
from xattn_video.measure.methods import DENSE, method_of
from xattn_video.policy.presets import preset_settings


def row(method, psnr):
    return {"method": method.to_dict(), "psnr": psnr, "ssim": 0.99, "density": 0.2} | {
        "latent_error": 0.05
    }


def test_each_video_is_compared_with_its_own_at_uniform_densities():
    densities = ThresholdSchedule.constant(0.1).to_dict() | {"kind": "density"}
    uniform = method_of(preset_settings("balanced"))
    schedule = ThresholdSchedule.from_dict(densities)
    calibrated = method_of(preset_settings("balanced", density=schedule))
    psnr = {uniform.name: (40.0, 42.0, 44.0), calibrated.name: (41.0, 41.9, 46.0)}
    comparison = {
        "command": "xattn-video compare",
        "versions": {"torch": "2.0"},
        "device": "NVIDIA GPU",
        "model": "demo",
        "num_prompts": 3,
        "video": {"width": 64, "height": 32, "num_frames": 5, "num_inference_steps": 20},
        "rows": [row(DENSE, None), row(uniform, 42.0), row(calibrated, 42.97)],
        "videos": [
            {"method": name, "prompt": prompt, "seed": 0, "similarity": {"psnr": value}}
            for name, values in psnr.items()
            for prompt, value in zip("abc", values, strict=True)
        ],
    }
    calibration = {
        "command": "xattn-video calibrate",
        "prompts": ["d", "e"],
        "uniform_error": 0.02,
        "calibrated_error": 0.015,
    }
    lines = section({"calibration": calibration, "comparison": comparison}).splitlines()
    assert lines[0].startswith("demo model, 64x32x5, 20 steps, 3 prompts, on NVIDIA GPU. ")
    assert (
        "from 2 other prompts, whose mean error of attention outputs they lower from 0.02"
        in lines[0]
    )
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if "|" in line]
    assert cells[0][-1] == "videos better"
    assert cells[2] == ["uniform", "42.00", "0.9900", "0.0500", "0.200", ""]
    assert cells[3] == ["by layer and head", "42.97", "0.9900", "0.0500", "0.200", "2 of 3"]
    assert lines[-3:] == ["xattn-video calibrate", "xattn-video compare", "```"]
