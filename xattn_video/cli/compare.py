"""`xattn-video compare`: dense against sparse videos, or two video files."""

from pathlib import Path

from xattn_video.cli import compare_options, options
from xattn_video.cli.compare_files import FilesJob
from xattn_video.cli.compare_job import CompareJob
from xattn_video.pipelines.source import HUNYUAN_VIDEO
from xattn_video.reporting.console import ErrorsToExitCodes, log_choices


def compare(
    prompt: options.Prompt = None,
    prompts_file: options.PromptsFile = None,
    demo_prompts: compare_options.DemoPrompts = None,
    thresholds: compare_options.Thresholds = "0.95",
    warmup_steps: compare_options.WarmupSteps = "5",
    strides: compare_options.Strides = "8",
    seeds: compare_options.Seeds = "0",
    noise_ceiling: compare_options.NoiseCeiling = True,
    kept_mass: compare_options.KeptMass = True,
    reference: compare_options.Reference = None,
    candidate: compare_options.Candidate = None,
    model: options.Model = HUNYUAN_VIDEO,
    height: options.Height = None,
    width: options.Width = None,
    num_frames: options.NumFrames = None,
    num_inference_steps: options.NumInferenceSteps = None,
    guidance_scale: options.GuidanceScale = None,
    true_cfg_scale: options.TrueCfgScale = None,
    negative_prompt: options.NegativePrompt = None,
    fps: options.Fps = 24,
    batch_size: compare_options.BatchSize = 1,
    block_size: options.BlockSize = 128,
    cooldown_steps: options.CooldownSteps = 0,
    min_tokens: options.MinTokens = None,
    backend: options.Backend = "auto",
    scoring_precision: options.ScoringPrecision = "auto",
    dtype: options.Dtype = None,
    device: options.Device = None,
    offload: options.OffloadOption = None,
    vae_tiling: options.VaeTiling = None,
    attention_backend: options.AttentionBackend = None,
    force: options.Force = False,
    output: compare_options.Output = None,
    videos: compare_options.Videos = True,
    verbose: options.Verbose = False,
) -> None:
    """Measure how far sparse videos are from dense ones, and what they save."""
    log_choices(verbose)
    with ErrorsToExitCodes(verbose) as errors:
        from xattn_video.pipelines.memory import settle_offload

        job: CompareJob | FilesJob
        if reference is not None or candidate is not None:
            job = FilesJob.of(reference, candidate, (prompt, prompts_file, demo_prompts), output)
        else:
            video = options.video_settings(
                model,
                height,
                width,
                num_frames,
                num_inference_steps,
                guidance_scale,
                true_cfg_scale,
            )
            prompts = compare_options.compared_prompts(model, prompt, prompts_file, demo_prompts)
            requests = compare_options.compared_requests(prompts, seeds, negative_prompt, video)
            methods = compare_options.compared_methods(
                thresholds,
                warmup_steps,
                strides,
                noise_ceiling,
                block_size=block_size,
                cooldown_steps=cooldown_steps,
                min_tokens=options.chosen_min_tokens(model, min_tokens),
                backend=backend,
                scoring_precision=scoring_precision,
            )
            load = settle_offload(
                options.load_options(model, dtype, device, offload, vae_tiling, attention_backend),
                video,
            )
            job = CompareJob(
                load,
                requests,
                methods,
                output or Path("compare"),
                fps,
                batch_size,
                videos,
                kept_mass,
                verbose,
                force,
            )
        job.check()
        errors.running = True
        job.run()
