"""Trains the VAE on windows of rendered clips, then normalises it so that latents have unit scale.

A window is decoded as the pipeline decodes a long clip: from latents that begin anywhere, not only
at a clip's first frame. The loss has squared error, which PSNR measures, and absolute error, which
keeps the colours of large plain areas; later it is PSNR itself. The decoder stage trains only the
decoder: latents do not change, so the transformer can be trained at the same time.
"""

import math
import random
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLHunyuanVideo
from diffusers.models.autoencoders.autoencoder_kl_hunyuan_video import (
    HunyuanVideoResnetBlockCausal3D,
)
from torch import Tensor, nn

from demo_training.graphs import StepGraphs
from demo_training.models import LATENT_CHANNELS, build_vae
from demo_training.pictures import save_sheet
from demo_training.rendered_clips import WINDOW_FRAMES, encode_windows, random_scene, render_clip
from demo_training.training_plan import Clock, Size, TrainingJob
from demo_training.vae_layers import use_training_layers
from demo_training.weights import (
    TrainedWeights,
    add_report,
    load_checkpoint,
    load_weights,
    restore_random_state,
    save_stage,
    save_state,
)

LEARNING_RATE = 2e-3
DECODER_LEARNING_RATE = 6e-4
WARMUP_STEPS = 60
KL_WEIGHT = 1e-4
# Fractions of the schedule until which frames are small, then medium. In its first thousand steps
# the VAE learns hardly anything with frames of any size, and small ones take a fraction of the
# time.
SMALL_UNTIL = 0.05
MEDIUM_UNTIL = 0.25
CROP_SHARE = 0.1
# From this fraction of the schedule on, the loss is PSNR, weighted to keep the share of the KL.
PSNR_FROM = 0.5
PSNR_WEIGHT = 0.01
SAVE_EVERY_S = 150.0
# Seconds reserved at the end of a call for saving, measuring and pictures.
RESERVE_S = 18.0
VAE_FILE = "vae.pt"


class ClipPool:
    """Rendered clips on the device, replaced one by one during training."""

    def __init__(self, job: TrainingJob, rng: random.Random, size: Size) -> None:
        self._job = job
        self._rng = rng
        self._size = size
        self._clips = [self._render() for _ in range(job.plan.clips)]

    def refresh(self) -> None:
        """Replace one clip."""
        self._clips[self._rng.randrange(len(self._clips))] = self._render()

    def batch(self, crop: int | None, count: int, num_frames: int) -> Tensor:
        """Random windows of ``num_frames`` frames, whole or cropped, half of them mirrored."""
        rng, windows = self._rng, []
        height, width = self._size
        for _ in range(count):
            clip = rng.choice(self._clips)
            first = rng.choice([0, rng.randint(0, clip.shape[1] - num_frames)])
            window = clip[:, first : first + num_frames]
            if crop is not None:
                top, left = rng.randint(0, height - crop), rng.randint(0, width - crop)
                window = window[:, :, top : top + crop, left : left + crop]
            windows.append(window.flip(-1) if rng.random() < 0.5 else window)
        return torch.stack(windows)

    def _render(self) -> Tensor:
        job = self._job
        scene = random_scene(self._rng)
        return render_clip(scene, self._rng, self._size, job.device, job.dtype)


def run(job: TrainingJob) -> None:
    """Train for one call; write the normalised `vae.pt` and `vae.ckpt.*` or `decoder.ckpt.*`."""
    if job.stage == "decoder":
        vae = load_vae(job).float()
        vae.decoder.requires_grad_(True)
        vae.post_quant_conv.requires_grad_(True)
    else:
        vae = build_vae()
        if job.start_from is not None:
            load_weights(vae, job.start_from / "vae")
        else:
            _let_blocks_begin_as_identity(vae)
    vae = vae.to(job.device, memory_format=torch.channels_last_3d).train()
    use_training_layers(vae)
    trained = TrainedWeights(
        [vae],
        dtype=job.dtype,
        stored_dtype=torch.float32,
        betas=(0.9, 0.99),
        weight_decay=1e-4,
        ema_decay=0.998,
    )
    before, calls, history = 0.0, 0, []
    if job.resume:
        state = load_checkpoint(job.work_dir, job.stage)
        trained.load_state(state["weights"])
        restore_random_state(state["random"])
        before, calls, history = state["spent"], state["calls"], state["history"]
    rng = random.Random(f"{job.seed}/{job.stage}/{calls}")
    sizes = {_frame_size(job, fraction) for fraction in (0.0, SMALL_UNTIL, MEDIUM_UNTIL)}
    pools = {size: ClipPool(job, rng, size) for size in sorted(sizes)}
    job.log("clips rendered")

    clock = Clock.begin(job, before, 5.0 if job.is_smoke else RESERVE_S)
    _train(job, vae, trained, pools, rng, clock, calls, history)
    save_stage(job, trained, clock, calls + 1, history)
    job.log(f"checkpoint saved at {clock.fraction:.0%} of the schedule")
    del pools

    # From here on many sizes run only a few times each.
    torch.backends.cudnn.benchmark = False
    final = _averaged_vae(trained).to(job.device)
    if job.stage == "vae":
        job.log(f"latents' own scale {normalise_latents(final, job)}")
    _write(final, job.work_dir / VAE_FILE)
    job.log(f"{VAE_FILE} saved")
    quality = measure_reconstruction(job, load_vae(job))
    add_report(
        job.work_dir,
        {
            "stage": job.stage,
            "training_seconds": round(clock.spent - before, 1),
            "steps": trained.steps_since_start,
            "schedule_fraction": round(clock.fraction, 4),
            "losses": history[-1] if history else None,
            "reconstruction_psnr_db": quality,
        },
    )


def _let_blocks_begin_as_identity(vae: AutoencoderKLHunyuanVideo) -> None:
    """Zero the last convolution of each residual block."""
    for module in vae.modules():
        if isinstance(module, HunyuanVideoResnetBlockCausal3D):
            nn.init.zeros_(module.conv2.conv.weight)
            nn.init.zeros_(module.conv2.conv.bias)


def load_vae(job: TrainingJob) -> AutoencoderKLHunyuanVideo:
    """The trained, normalised VAE, frozen, as it will be shipped.

    It comes from `vae.pt`. If that is missing and a finished model is refined, it comes from the
    model and is written to `vae.pt`.
    """
    path = job.work_dir / VAE_FILE
    vae = build_vae()
    if path.is_file():
        vae.load_state_dict(torch.load(path, weights_only=True))
    elif job.start_from is not None:
        load_weights(vae, job.start_from / "vae")
        _write(vae, path)
    else:
        raise FileNotFoundError(f"{path} is missing; run the vae stage first.")
    return vae.requires_grad_(False).eval().to(job.device, job.dtype)


def _write(vae: AutoencoderKLHunyuanVideo, path: Path) -> None:
    state = {name: value.to("cpu", torch.bfloat16) for name, value in vae.state_dict().items()}
    save_state(path, state)


def _frame_size(job: TrainingJob, fraction: float) -> Size:
    """Frame size of the clips for batches at this fraction of the schedule."""
    if job.stage == "decoder" or fraction >= MEDIUM_UNTIL:
        return job.plan.square
    return job.plan.small if fraction < SMALL_UNTIL else job.plan.medium


def _draw_batch(
    job: TrainingJob, pools: dict[Size, ClipPool], rng: random.Random, step: int, fraction: float
) -> tuple[Tensor, int, str]:
    """Frames, the latent at which decoding begins, and the name of the batch's kind."""
    plan, size = job.plan, _frame_size(job, fraction)
    pool = pools[size]
    if step % 5 == 0:
        pool.refresh()
    if size == plan.small:
        return pool.batch(None, plan.small_batch, WINDOW_FRAMES), 0, "small"
    if size == plan.medium:
        return pool.batch(None, plan.medium_batch, WINDOW_FRAMES), 0, "medium"
    is_crop = rng.random() < CROP_SHARE
    count = plan.crop_batch if is_crop else plan.square_batch
    first_latent = rng.choice([0, rng.randint(1, 4)])
    num_frames = WINDOW_FRAMES if first_latent == 0 else 2 * WINDOW_FRAMES - 1
    frames = pool.batch(plan.crop if is_crop else None, count, num_frames)
    return frames, first_latent, "crop" if is_crop else "square"


def _loss(
    vae: AutoencoderKLHunyuanVideo, frames: Tensor, first_latent: int, *, by_psnr: bool
) -> tuple[Tensor, Tensor]:
    """Loss and (mean absolute error, mean squared error, KL) of one batch."""
    mean, log_variance = encode_windows(vae, frames)
    latents = mean + torch.exp(0.5 * log_variance) * torch.randn_like(mean)
    latents = latents[:, :, first_latent : first_latent + 5].to(frames.dtype)
    decoded = vae.decoder(vae.post_quant_conv(latents)).float()
    target = frames.float()[:, :, 4 * first_latent : 4 * first_latent + WINDOW_FRAMES]
    if first_latent:
        # The first latent of a later window only gives context.
        decoded, target = decoded[:, :, 1:], target[:, :, 1:]
    error = decoded - target
    absolute, squared = error.abs().mean(), error.square().mean((1, 2, 3, 4))
    kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
    if by_psnr:
        # The mean of the windows' PSNR, up to a factor.
        of_error = PSNR_WEIGHT * squared.clamp(min=1e-8).log().mean()
    else:
        of_error = absolute + 2 * squared.mean()
    # With a frozen encoder the KL has no gradient.
    return of_error + KL_WEIGHT * kl, torch.stack([absolute, squared.mean(), kl])


def _train(
    job: TrainingJob,
    vae: AutoencoderKLHunyuanVideo,
    trained: TrainedWeights,
    pools: dict[Size, ClipPool],
    rng: random.Random,
    clock: Clock,
    calls: int,
    history: list[dict[str, Any]],
) -> None:
    recent: dict[str, list[Tensor]] = {}
    reported = saved = time.time()
    reported_step = trained.step_count
    graphs = StepGraphs(trained.parameters)
    while not clock.is_over:
        fraction = clock.fraction
        frames, first_latent, kind = _draw_batch(job, pools, rng, trained.step_count, fraction)
        by_psnr = job.stage == "decoder" or fraction >= PSNR_FROM
        compute = partial(_loss, vae, first_latent=first_latent, by_psnr=by_psnr)
        _, parts = graphs.run((kind, first_latent, by_psnr), compute, frames)
        peak = DECODER_LEARNING_RATE if job.stage == "decoder" else LEARNING_RATE
        rate = peak * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * fraction)))
        trained.step(rate, WARMUP_STEPS)
        recent.setdefault(kind, []).append(parts)
        now = time.time()
        if now - reported >= job.plan.report_every:
            line = _summary(recent)
            steps = trained.step_count - reported_step
            line |= {"step": trained.step_count, "fraction": round(clock.fraction, 4)}
            line |= {"ms_a_step": round((time.time() - reported) / steps * 1e3, 1)}
            history.append(line)
            job.log(f"{job.stage} {line}")
            recent, reported, reported_step = {}, time.time(), trained.step_count
        if now - saved >= SAVE_EVERY_S:
            save_stage(job, trained, clock, calls + 1, history)
            saved = time.time()


def _summary(recent: dict[str, list[Tensor]]) -> dict[str, Any]:
    """PSNR by kind of batch, and the mean KL."""
    means = {kind: torch.stack(rows).mean(0).tolist() for kind, rows in recent.items()}
    line: dict[str, Any] = {kind: round(_psnr(row[1]), 2) for kind, row in means.items()}
    line["kl"] = round(sum(row[2] for row in means.values()) / len(means), 3)
    return line


def _psnr(squared_error: float) -> float:
    """PSNR in dB of values in [-1, 1]."""
    return 10 * math.log10(4 / max(squared_error, 1e-10))


@torch.no_grad()
def _averaged_vae(trained: TrainedWeights) -> AutoencoderKLHunyuanVideo:
    """A float32 VAE with the moving average of the weights."""
    vae = build_vae()
    for parameter, average in zip(vae.parameters(), trained.ema, strict=True):
        parameter.copy_(average)
    return vae.requires_grad_(False).eval()


@torch.no_grad()
def normalise_latents(vae: AutoencoderKLHunyuanVideo, job: TrainingJob) -> dict[str, list[float]]:
    """Fold each latent channel's mean and scale into the adjacent 1x1x1 convolutions; exact."""
    rng = random.Random(f"{job.seed}/statistics")
    means, variances = [], []
    for _ in range(2 if job.is_smoke else 32):
        clip = render_clip(random_scene(rng), rng, job.plan.square, job.device, torch.float32)
        mean, log_variance = encode_windows(vae, clip[None])
        means.append(mean)
        variances.append(log_variance.exp().mean((0, 2, 3, 4)))
    stacked = torch.cat(means)
    centre = stacked.mean((0, 2, 3, 4))
    scale = (stacked.var((0, 2, 3, 4)) + torch.stack(variances).mean(0)).sqrt()
    C = LATENT_CHANNELS
    before, after = vae.quant_conv, vae.post_quant_conv
    before.weight[:C] /= scale.view(-1, 1, 1, 1, 1)
    before.bias[:C] = (before.bias[:C] - centre) / scale
    before.bias[C:] -= 2 * scale.log()
    after.bias += after.weight[:, :, 0, 0, 0] @ centre
    after.weight *= scale.view(1, -1, 1, 1, 1)
    return {
        "mean": [round(value, 3) for value in centre.tolist()],
        "std": [round(value, 3) for value in scale.tolist()],
    }


@torch.no_grad()
def measure_reconstruction(
    job: TrainingJob, vae: AutoencoderKLHunyuanVideo
) -> dict[str, dict[str, float]]:
    """{frame size: PSNR} of held-out 65-frame clips after stock encoding and decoding."""
    rng = random.Random(f"{job.seed}/held-out")
    plan = job.plan
    result: dict[str, dict[str, float]] = {}
    pictures: list[Tensor] = []
    counts = {plan.square: plan.eval_clips, plan.wide: 4, plan.tall: 4, plan.large: 4}
    if job.is_smoke:
        counts = {plan.square: 1, plan.wide: 1}
    for size, count in counts.items():
        values = []
        for _ in range(count):
            scene = random_scene(rng, held_out=True)
            clip = render_clip(scene, rng, size, job.device, job.dtype)[None]
            decoded = vae.decode(vae.encode(clip).latent_dist.mode()).sample.float().clamp(-1, 1)
            values.append(_psnr((decoded - clip.float()).square().mean().item()))
            if size == plan.square and len(pictures) < 8:
                pictures += [clip[0], decoded[0]]
        name = f"{size[1]}x{size[0]}"
        result[name] = {
            "mean": round(sum(values) / count, 2),
            "min": round(min(values), 2),
            "clips": count,
        }
        job.log(f"reconstruction of held-out 65-frame clips {name}: {result[name]}")
    save_sheet([picture / 2 + 0.5 for picture in pictures], job.work_dir / "vae_sheet.png")
    return result
