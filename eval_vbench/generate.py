"""Generate a run's videos: dense, or sparse at one setting; again to resume.

python -m eval_vbench.generate --run runs/dense --dense
accelerate launch -m eval_vbench.generate --run runs/xattn-0.95 --threshold 0.95
"""

from pathlib import Path
from typing import Annotated

import typer

from eval_vbench.launch import Share, launched_share
from eval_vbench.prompts import DEFAULT_SUITE, DEMO_SUITE, SUITES, VIDEOS_PER_PROMPT
from eval_vbench.run_folder import RunFolder
from eval_vbench.sampling_job import SamplingJob
from xattn_video.cli import options
from xattn_video.pipelines.source import DEMO, HUNYUAN_VIDEO
from xattn_video.reporting.console import (
    ErrorsToExitCodes,
    OneLineCommand,
    expands_paths,
    log_choices,
)

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command(cls=OneLineCommand)
@expands_paths
def main(
    run: Annotated[Path, typer.Option(help="The run's folder; one that exists is resumed.")],
    suite: Annotated[
        str | None,
        typer.Option(
            help=f"Prompts: {', '.join(SUITES)}.",
            show_default=f"{DEFAULT_SUITE}; demo for the demo model",
        ),
    ] = None,
    num_prompts: Annotated[
        int | None, typer.Option(help="A part of the suite.", show_default="all")
    ] = None,
    videos_per_prompt: Annotated[
        int,
        typer.Option(help=f"{' or '.join(map(str, VIDEOS_PER_PROMPT))}, which VBench asks for."),
    ] = 1,
    lossless: Annotated[
        bool, typer.Option(help="Keep lossless copies, which PSNR and SSIM are measured on.")
    ] = True,
    model: options.Model = HUNYUAN_VIDEO,
    height: options.Height = None,
    width: options.Width = None,
    num_frames: options.NumFrames = None,
    num_inference_steps: options.NumInferenceSteps = None,
    guidance_scale: options.GuidanceScale = None,
    seed: Annotated[int, typer.Option(help="Every video's own seed is derived from it.")] = 0,
    fps: options.Fps = 24,
    threshold: options.Threshold = None,
    schedule: options.Schedule = None,
    stride: options.Stride = 8,
    block_size: options.BlockSize = 128,
    warmup_steps: options.WarmupSteps = 5,
    cooldown_steps: options.CooldownSteps = 0,
    min_tokens: options.MinTokens = None,
    dense: options.Dense = False,
    backend: options.Backend = "auto",
    scoring_precision: options.ScoringPrecision = "auto",
    dtype: options.Dtype = None,
    device: options.Device = None,
    offload: options.OffloadOption = None,
    vae_tiling: options.VaeTiling = None,
    attention_backend: options.AttentionBackend = None,
    verbose: options.Verbose = False,
) -> None:
    """Generate a run's videos; the same command resumes it."""
    log_choices(verbose)
    share = launched_share()
    with ErrorsToExitCodes(verbose) as errors:
        from xattn_video.pipelines.memory import settle_offload

        video = options.video_settings(
            model, height, width, num_frames, num_inference_steps, guidance_scale, None
        )
        sparse = options.sparse_settings(
            threshold,
            schedule,
            dense,
            stride=stride,
            block_size=block_size,
            warmup_steps=warmup_steps,
            cooldown_steps=cooldown_steps,
            min_tokens=options.chosen_min_tokens(model, min_tokens),
            backend=backend,
            scoring_precision=scoring_precision,
        )
        if device is None:
            device = _device_of(share)
        load = settle_offload(
            options.load_options(model, dtype, device, offload, vae_tiling, attention_backend),
            video,
        )
        job = SamplingJob(
            RunFolder(run),
            share,
            load,
            suite or (DEMO_SUITE if model == DEMO else DEFAULT_SUITE),
            num_prompts,
            videos_per_prompt,
            seed,
            fps,
            lossless,
            video,
            sparse,
            verbose,
        )
        job.check()
        with job.run.lock(share.rank, share.num_ranks):
            errors.running = True
            job.generate()


def _device_of(share: Share) -> str | None:
    """A GPU for each rank of a host; None, the usual choice, for a process that is alone."""
    import torch

    if share.num_ranks == 1 or not torch.cuda.is_available():
        return None
    return f"cuda:{share.local_rank}"


if __name__ == "__main__":
    app()
