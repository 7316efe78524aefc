"""Check that the demo model does what its prompts say, measured from the pixels.

    python scripts/check_demo_model.py --dense --output dense.json
    python scripts/check_demo_model.py --threshold 0.95 --output sparse.json

It generates a fixed set of prompts with held-out combinations of shape, colour, motion and
background. Background and number are checked once per clip; colour, start, motion and shape once
per object. It prints the share right for each and writes every measurement as JSON.
"""

import argparse
import contextlib
import dataclasses
import time
from typing import Any

import torch

from xattn_video.files import check_output_path, user_path, write_json
from xattn_video.measure.demo_checks import ATTRIBUTES, measure_clip, score_measurement
from xattn_video.pipelines.demo import Scene, held_out_scenes, load_demo_pipeline
from xattn_video.reporting.endings import run_script

GOALS = dict.fromkeys(ATTRIBUTES, 0.9) | {"shape": 0.8}


def main() -> int:
    """Generate, measure and report; returns 0 if every goal is met, else 1."""
    arguments = _parse_arguments()
    if arguments.output is not None:
        check_output_path(arguments.output, (".json",))
    scenes = held_out_scenes(arguments.num_prompts, arguments.seed)
    pipeline = load_demo_pipeline(device=arguments.device)
    pipeline.set_progress_bar_config(disable=True)
    clips = []
    with contextlib.ExitStack() as stack:
        if arguments.threshold is not None:
            from xattn_video import enable_xattention

            stack.enter_context(
                enable_xattention(
                    pipeline,
                    threshold=arguments.threshold,
                    warmup_steps=arguments.warmup_steps,
                    min_tokens=0,
                )
            )
        for index, scene in enumerate(scenes):
            clips.append(_check_scene(pipeline, scene, arguments, index))
    shares = _shares(clips)
    _print_shares(shares)
    if arguments.output is not None:
        settings = {name: value for name, value in vars(arguments).items() if name != "output"}
        device = str(pipeline.device)
        settings |= {"device": device, "dtype": str(pipeline.dtype), "torch": torch.__version__}
        result = {"settings": settings, "shares": shares, "clips": clips}
        write_json(arguments.output, result)
    return 0 if all(shares[name]["share"] >= goal for name, goal in GOALS.items()) else 1


def _check_scene(
    pipeline: Any, scene: Scene, arguments: argparse.Namespace, index: int
) -> dict[str, Any]:
    """Generate one clip and check it."""
    begun = time.perf_counter()
    video = pipeline(
        scene.prompt,
        height=arguments.height,
        width=arguments.width,
        num_frames=arguments.num_frames,
        num_inference_steps=arguments.num_inference_steps,
        generator=torch.Generator().manual_seed(arguments.seed + index),
        output_type="pt",
    ).frames[0]
    seconds = time.perf_counter() - begun
    seen = measure_clip(video, num_objects=len(scene.objects))
    right = score_measurement(seen, scene)
    wrong = [name for name in ATTRIBUTES if not all(right[name])]
    verdict = f"wrong: {', '.join(wrong)}" if wrong else "right"
    print(f"{index + 1:3} {seconds:6.1f} s  {scene.prompt}  {verdict}", flush=True)
    return {
        "prompt": scene.prompt,
        "right": right,
        "measured": dataclasses.asdict(seen),
    }


def _shares(clips: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    shares = {}
    for name in ATTRIBUTES:
        judged = [right for clip in clips for right in clip["right"][name]]
        shares[name] = {
            "share": round(sum(judged) / len(judged), 4),
            "right": sum(judged),
            "judged": len(judged),
        }
    return shares


def _print_shares(shares: dict[str, dict[str, float]]) -> None:
    for name, row in shares.items():
        print(
            f"{name:<11} {row['share']:7.1%}  {row['right']:>3} of {row['judged']:<3}"
            f"  goal {GOALS[name]:.0%}"
        )


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    kind = parser.add_mutually_exclusive_group(required=True)
    kind.add_argument("--threshold", type=float, help="use sparse attention with this threshold")
    kind.add_argument(
        "--dense", action="store_true", help="use the pipeline's own dense attention"
    )
    parser.add_argument("--warmup-steps", type=int, default=5)
    parser.add_argument("--num-prompts", type=int, default=40)
    parser.add_argument("--num-inference-steps", type=int, default=25)
    parser.add_argument("--num-frames", type=int, default=65)
    parser.add_argument("--height", type=int, default=256)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", help="default: CUDA if there is one, else the CPU")
    parser.add_argument("--output", type=user_path, help="JSON file to write")
    return parser.parse_args()


if __name__ == "__main__":
    run_script(main)
