"""Measures how the error of a step grows with the age of the residual.

    python -m benchmarks.residual_age --output benchmarks/results/residual_age/demo-cpu.json

The demo model generates videos. At every step a copy of it with Diffusers' own attention computes
an output from the same latents. The error is the norm of the difference of the outputs, relative
to the copy's output. `benchmarks.write_page` draws the committed file.
"""

import argparse
import copy
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from benchmarks.results_files import RESULTS, read_json
from benchmarks.script_options import HERE
from xattn_video import enable_xattention
from xattn_video.files import check_output_path, user_path, write_json
from xattn_video.pipelines.demo import load_demo_pipeline
from xattn_video.pipelines.demo.grammar import held_out_scenes
from xattn_video.policy.presets import parse_setting
from xattn_video.reporting.endings import run_script
from xattn_video.reporting.machine import machine_record

MEASURED = RESULTS / "residual_age" / "demo-cpu.json"
NAME = "fewer-blocks-age.png"
COMPACT = "density=0.1,token_order=hilbert,compensation=first-order"
SETTINGS = {
    "plain": "density=0.1",
    "compensated": COMPACT,
    "with refreshes": f"{COMPACT},refresh_every=20",
}


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--height", type=int, default=256)
    add("--width", type=int, default=256)
    add("--num-frames", type=int, default=33)
    add("--num-inference-steps", type=int, default=50)
    add("--num-prompts", type=int, default=2)
    add("--device", default=HERE)
    add("--output", type=user_path, required=True)
    arguments = parser.parse_args(words)
    video = {
        name: getattr(arguments, name)
        for name in ("height", "width", "num_frames", "num_inference_steps")
    }
    check_output_path(arguments.output, (".json",))
    scenes = held_out_scenes(arguments.num_prompts)
    pipe = load_demo_pipeline(device=arguments.device)
    rows = [
        {"setting": name, "prompt": scene.prompt, **row}
        for name in SETTINGS
        for scene in scenes
        for row in measure(pipe, SETTINGS[name], scene.prompt, video)
    ]
    record = {"machine": machine_record(torch.device(arguments.device)), "settings": SETTINGS}
    write_json(arguments.output, record | {"video": video, "rows": rows})
    for name in SETTINGS:
        errors = [row["error"] for row in rows if row["setting"] == name and row["sparse"]]
        print(f"{name}: mean error {sum(errors) / len(errors):.4f} in {len(errors)} sparse steps")


def measure(
    pipe: Any, setting: str, prompt: str, video: dict[str, int]
) -> list[dict[str, float | bool]]:
    """The error of every step of one generation, and whether it ran sparse or refreshed."""
    dense = copy.deepcopy(pipe.transformer)
    errors: list[float] = []

    def compare(_: nn.Module, args: Any, given: dict[str, Any], found: Any) -> None:
        expected: Tensor = dense(*args, **given)[0]
        errors.append(((found[0] - expected).norm() / expected.norm()).item())

    with (
        enable_xattention(pipe, parse_setting(setting, min_tokens=0)) as handle,
        pipe.transformer.register_forward_hook(compare, with_kwargs=True),
        torch.no_grad(),
    ):
        generator = torch.Generator().manual_seed(0)
        pipe(prompt=prompt, generator=generator, output_type="latent", **video)
    runs = handle.report().forwards
    return [
        {
            "step": run.step,
            "error": error,
            "sparse": any(layer.state == "sparse" for layer in run.layers),
            "refreshed": any(layer.refreshed for layer in run.layers),
        }
        for run, error in zip(runs, errors, strict=True)
    ]


def errors_by_age(rows: list[dict[str, Any]]) -> dict[int, float]:
    """The mean error of sparse steps by the number of steps since the last refresh."""
    found = defaultdict(list)
    last = 0
    for row in rows:
        if row["refreshed"]:
            last = row["step"]
        elif row["sparse"]:
            found[row["step"] - last].append(row["error"])
    return {age: sum(errors) / len(errors) for age, errors in sorted(found.items())}


def draw_ages(path: Path = MEASURED) -> Figure:
    """Draw the error by denoising step for each setting, and by age for refreshes."""
    record = read_json(path)
    figure = Figure(figsize=(9, 3.8), layout="constrained")
    by_step, by_age = figure.subplots(1, 2, sharey=True)
    for name, colour in zip(record["settings"], ("0.5", "#4477aa", "#228833"), strict=True):
        rows = [row for row in record["rows"] if row["setting"] == name]
        errors = defaultdict(list)
        for row in rows:
            if row["sparse"] and not row["refreshed"]:
                errors[row["step"]].append(row["error"])
        steps = sorted(errors)
        means = [sum(errors[step]) / len(errors[step]) for step in steps]
        by_step.plot(steps, means, ".", color=colour, label=name)
    ages = errors_by_age(rows)
    by_age.plot(list(ages), list(ages.values()), ".", color=colour)
    by_step.set(xlabel="denoising step", ylabel="relative error of the step", yscale="log")
    by_age.set(xlabel="steps since the refresh")
    for axes in (by_step, by_age):
        axes.grid(alpha=0.3)
    by_age.xaxis.get_major_locator().set_params(integer=True)
    figure.legend(loc="outside lower center", ncols=len(record["settings"]), frameon=False)
    return figure


if __name__ == "__main__":
    run_script(main)
