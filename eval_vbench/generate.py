"""Generate a run's videos: dense, or sparse at one setting; again to resume.

python -m eval_vbench.generate --run runs/dense --dense
accelerate launch -m eval_vbench.generate --run runs/xattn-0.95 --threshold 0.95
"""

from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from eval_vbench.launch import Share, launched_share
from eval_vbench.prompts import (
    DEFAULT_SUITE,
    DEMO_SUITE,
    SUITES,
    VIDEOS_PER_PROMPT,
    VideoItem,
    choose_prompts,
    video_items,
)
from eval_vbench.run_folder import RunFolder
from xattn_video.cli import options
from xattn_video.cli.checks import check_runs
from xattn_video.cli.console import (
    ErrorsToExitCodes,
    log_choices,
    message_console,
    output_console,
    quiet_libraries,
)
from xattn_video.cli.progress import GenerationProgress
from xattn_video.pipelines.request import GenerationRequest, SparseSettings, VideoSettings
from xattn_video.pipelines.source import DEMO, HUNYUAN_VIDEO
from xattn_video.pipelines.video import check_output_folder
from xattn_video.schedule import ThresholdSchedule

if TYPE_CHECKING:
    from xattn_video.pipelines.generation import StepRecord
    from xattn_video.pipelines.hunyuan_video import LoadOptions

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
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
    min_tokens: options.MinTokens = 1024,
    dense: options.Dense = False,
    backend: options.Backend = "auto",
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
        video = options.video_settings(
            model, height, width, num_frames, num_inference_steps, guidance_scale, None
        )
        tau = options.choose_threshold(threshold, schedule, dense)
        sparse = None
        if tau is not None:
            sparse = SparseSettings(
                tau, stride, block_size, warmup_steps, cooldown_steps, min_tokens, backend
            )
        if device is None:
            device = _device_of(share)
        load = options.load_options(model, dtype, device, offload, vae_tiling, attention_backend)
        suite = suite or (DEMO_SUITE if model == DEMO else DEFAULT_SUITE)
        prompts = choose_prompts(suite, num_prompts)
        items = video_items(prompts, videos_per_prompt, seed)
        if fps < 1:
            raise ValueError(f"fps must be at least 1, got {fps}; use 24.")
        if share.rank == 0:
            check_runs(load, [GenerationRequest(prompts[0].text, video=video, sparse=sparse)])
        check_output_folder(run, what="run")
        folder = RunFolder(run)
        folder.adopt(
            {
                "suite": suite,
                "num_prompts": len(prompts),
                "videos_per_prompt": videos_per_prompt,
                "seed": seed,
                "fps": fps,
                "lossless": lossless,
                "model": model,
                "dtype": str(load.resolved_dtype).removeprefix("torch."),
                "attention_backend": attention_backend,
                "video": asdict(video),
                "sparse": _sparse_settings(sparse),
            }
        )
        with folder.lock(share.rank, share.num_ranks):
            errors.running = True
            _generate(folder, share, items, load, video, sparse, verbose)


def _generate(
    run: RunFolder,
    share: Share,
    items: list[VideoItem],
    load: "LoadOptions",
    video: VideoSettings,
    sparse: SparseSettings | None,
    verbose: bool,
) -> None:
    """Generate this rank's missing videos and say what became of them."""
    from eval_vbench.sampling import Sampling, wait_for_others
    from xattn_video.pipelines.hunyuan_video import load_pipeline

    messages = message_console()
    settings = run.settings()
    prefix = f"[{share.rank}] " if share.num_ranks > 1 else ""

    def say(text: str) -> None:
        messages.print(prefix + text, soft_wrap=True)

    sampling = Sampling(
        run,
        share,
        video,
        sparse,
        settings["fps"],
        settings["lossless"],
        say,
        # Steps of several processes would run into one another.
        lambda title: (
            GenerationProgress(messages, title, video.num_inference_steps)
            if share.num_ranks == 1
            else nullcontext(_ignore)
        ),
    )
    missing = sampling.missing(items)
    say(f"{len(share.of(items)) - len(missing)} of {len(share.of(items))} videos are there")
    failed = 0
    if missing:
        if not verbose:
            quiet_libraries()
        say(f"loading {load.model}")
        pipe = load_pipeline(load)
        pipe.set_progress_bar_config(disable=True)
        failed = sampling.sample(pipe, missing)
    if failed:
        wait_for_others(run, items)
        raise RuntimeError(
            f"{failed} of {len(missing)} videos failed, as listed above and in "
            f"{run.path / 'failures'}; the same command tries them again and keeps the others."
        )
    output_console().print(f"{prefix}videos     {run.videos}", soft_wrap=True)


def _ignore(step: "StepRecord") -> None:
    """Show nothing of a step."""


def _device_of(share: Share) -> str | None:
    """A GPU for each rank of a host; None, the usual choice, for a process that is alone."""
    import torch

    if share.num_ranks == 1 or not torch.cuda.is_available():
        return None
    return f"cuda:{share.local_rank}"


def _sparse_settings(sparse: SparseSettings | None) -> dict[str, Any] | None:
    """As plain values."""
    if sparse is None:
        return None
    threshold = sparse.threshold
    if isinstance(threshold, ThresholdSchedule):
        return asdict(replace(sparse, threshold=1.0)) | {"threshold": threshold.to_dict()}
    return asdict(sparse)


if __name__ == "__main__":
    app()
