"""`xattn-video generate`: one video or many, with one load of the model."""

from xattn_video.cli import options
from xattn_video.cli.generate_job import GenerateJob, check_job, run_job
from xattn_video.cli.outputs import choose_outputs, choose_prompts
from xattn_video.pipelines.request import GenerationRequest
from xattn_video.pipelines.source import HUNYUAN_VIDEO
from xattn_video.reporting.console import ErrorsToExitCodes, log_choices


def generate(
    prompt: options.Prompt = None,
    prompts_file: options.PromptsFile = None,
    model: options.Model = HUNYUAN_VIDEO,
    height: options.Height = None,
    width: options.Width = None,
    num_frames: options.NumFrames = None,
    num_inference_steps: options.NumInferenceSteps = None,
    guidance_scale: options.GuidanceScale = None,
    true_cfg_scale: options.TrueCfgScale = None,
    negative_prompt: options.NegativePrompt = None,
    seed: options.Seed = 0,
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
    force: options.Force = False,
    output: options.Output = None,
    report: options.Report = None,
    plot: options.Plot = None,
    verbose: options.Verbose = False,
) -> None:
    """Generate a video, or one for each line of a file."""
    log_choices(verbose)
    with ErrorsToExitCodes(verbose) as errors:
        from xattn_video.pipelines.memory import settle_offload

        prompts = choose_prompts(prompt, prompts_file)
        video = options.video_settings(
            model, height, width, num_frames, num_inference_steps, guidance_scale, true_cfg_scale
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
        load = settle_offload(
            options.load_options(model, dtype, device, offload, vae_tiling, attention_backend),
            video,
        )
        requests = tuple(
            GenerationRequest(p, negative_prompt, seed, video, sparse) for p in prompts
        )
        outputs = choose_outputs(requests, prompts_file is not None, output, report, plot)
        job = GenerateJob(load, requests, outputs, fps, verbose, force)
        check_job(job)
        errors.running = True
        run_job(job)
