"""Measures sparse attention together with FirstBlockCache or FP8 casting, on the demo model.

    python -m benchmarks.accelerations --output results.json

Every video is compared with the dense one of the same prompt and seed, in bfloat16 and without a
cache. Work is counted, not timed: calls of transformer blocks, and blocks of the attention matrix.
The demo model is too small for its times to say anything about HunyuanVideo.
"""

import argparse
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from statistics import mean

import torch
from diffusers import FirstBlockCacheConfig, HunyuanVideoPipeline

from benchmarks.results_writer import ResultsWriter, environment
from benchmarks.script_options import comma_separated, measuring_parser
from xattn_video.measure.frames import FrameScores, score_frames
from xattn_video.pipelines.demo import held_out_scenes, load_demo_pipeline
from xattn_video.pipelines.generation import GenerationResult, generate
from xattn_video.pipelines.request import DEMO_SETTINGS, GenerationRequest, VideoSettings
from xattn_video.policy.presets import parse_setting
from xattn_video.policy.report import LayerRun, SparsityReport
from xattn_video.reporting.endings import run_script

DENSE = "threshold=1"
SETTINGS = (DENSE, "threshold=0.9", "preset=balanced")


@dataclass(frozen=True, slots=True)
class Variant:
    """One way to generate.

    Args:
        setting: The setting of sparse attention; `DENSE` for dense attention.
        cache_threshold: The threshold of FirstBlockCache; None for no cache.
        casting: Whether weights are stored in 8 bits.
    """

    setting: str
    cache_threshold: float | None = None
    casting: bool = False


def main(words: list[str] | None = None) -> None:
    arguments = parse_arguments(words)
    device = torch.device(arguments.device)
    results = ResultsWriter(arguments.output, environment(device, arguments.commit))
    pipe = load(device)
    references = generate_all(pipe, Variant(DENSE), arguments)
    for cache_threshold in (None, *arguments.cache_threshold):
        variants = [Variant(setting, cache_threshold) for setting in arguments.setting]
        measure(pipe, variants, references, arguments, results)
    del pipe
    pipe = load(device)
    pipe.transformer.enable_layerwise_casting(torch.float8_e4m3fn, pipe.transformer.dtype)
    variants = [Variant(setting, casting=True) for setting in arguments.setting]
    measure(pipe, variants, references, arguments, results)


def parse_arguments(words: list[str] | None) -> argparse.Namespace:
    parser = measuring_parser(__doc__, "cuda")
    add = parser.add_argument
    add("--num-prompts", type=int, default=8, help="prompts that the model was not trained on")
    add("--num-frames", type=int, default=DEMO_SETTINGS.num_frames)
    add("--num-inference-steps", type=int, default=DEMO_SETTINGS.num_inference_steps)
    add("--cache-threshold", type=comma_separated(float), default=[0.05, 0.1, 0.2])
    text = f"such as preset=fast; if none is given, {', '.join(SETTINGS)}"
    add("--setting", action="append", default=[], help=text)
    arguments = parser.parse_args(words)
    arguments.setting = arguments.setting or [*SETTINGS]
    return arguments


def load(device: torch.device) -> HunyuanVideoPipeline:
    pipe = load_demo_pipeline(torch.bfloat16, device)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def measure(
    pipe: HunyuanVideoPipeline,
    variants: Iterable[Variant],
    references: list[GenerationResult],
    arguments: argparse.Namespace,
    results: ResultsWriter,
) -> None:
    """Add a row for each variant, with means over all prompts."""
    for variant in variants:
        found = references
        if variant != Variant(DENSE):
            found = generate_all(pipe, variant, arguments)
        scores = [
            score_frames(dense.frames, result.frames, pipe.device)
            for dense, result in zip(references, found, strict=True)
        ]
        row = asdict(variant) | {"num_prompts": arguments.num_prompts} | video_sizes(arguments)
        work = counted_work([result.report for result in found])
        results.add(row | picture(scores) | work, True)
        print(results.rows[-1], flush=True)


def generate_all(
    pipe: HunyuanVideoPipeline, variant: Variant, arguments: argparse.Namespace
) -> list[GenerationResult]:
    """Generate one video per prompt, separately because a cache decides for a whole batch."""
    video = VideoSettings(**video_sizes(arguments))
    sparse = parse_setting(variant.setting, min_tokens=0)
    if variant.cache_threshold is not None:
        pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=variant.cache_threshold))
    try:
        return [
            generate(pipe, GenerationRequest(scene.prompt, video=video, sparse=sparse))
            for scene in held_out_scenes(arguments.num_prompts)
        ]
    finally:
        if variant.cache_threshold is not None:
            pipe.transformer.disable_cache()


def video_sizes(arguments: argparse.Namespace) -> dict[str, int]:
    return {
        "height": DEMO_SETTINGS.height,
        "width": DEMO_SETTINGS.width,
        "num_frames": arguments.num_frames,
        "num_inference_steps": arguments.num_inference_steps,
    }


def picture(scores: list[FrameScores]) -> dict[str, float]:
    """The similarity of the videos to their dense ones."""
    psnr = [mean(one.psnr) for one in scores]
    return {
        "psnr": mean(psnr),
        "worst_psnr": min(psnr),
        "ssim": mean(mean(one.ssim) for one in scores),
    }


def counted_work(reports: Iterable[SparsityReport | None]) -> dict[str, float]:
    """The work as shares of that of dense attention without a cache.

    Returns:
        ``blocks``: calls of transformer blocks; ``attention``: blocks of the attention matrix.
    """
    runs = [run for one in reports if one for forward in one.forwards for run in forward.layers]
    # All layers have the same tokens.
    valid = next(run.valid for run in runs if run.valid)
    return {
        "blocks": mean(run.state != "skipped" for run in runs),
        "attention": mean(attended(run) / valid for run in runs),
    }


def attended(run: LayerRun) -> int:
    """Blocks of the attention matrix that a layer computed, all of them too at a refresh."""
    kept = run.kept or 0
    return kept + (run.valid or 0) * (run.state == "dense" or run.refreshed)


if __name__ == "__main__":
    run_script(main)
