"""Trains the transformer on pools of encoded clips and prompts."""

import itertools
import math
import random
import time
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from diffusers import HunyuanVideoTransformer3DModel
from diffusers.models.transformers.transformer_hunyuan_video import HunyuanVideoAttnProcessor2_0
from torch import Tensor, nn

from demo_training.graphs import StepGraphs
from demo_training.latents import LatentPool, fill_pools
from demo_training.models import TextStack, build_transformer
from demo_training.text_stage import load_text_stack
from demo_training.training_attention import TrainingProcessor, rotation_of, use_training_attention
from demo_training.training_plan import Clock, Size, TrainingJob
from demo_training.vae_layers import use_training_layers
from demo_training.vae_stage import load_vae
from demo_training.weights import (
    TrainedWeights,
    add_report,
    load_checkpoint,
    load_weights,
    restore_random_state,
    save_stage,
)

LEARNING_RATE = 1.2e-3
REFINING_LEARNING_RATE = 8e-4
# Learning rate of Muon over AdamW's; Muon's steps are a fifth of an undisturbed AdamW step.
MATRIX_RATE = 2.0
FLAT_UNTIL = 0.3
WARMUP_STEPS = 120
SIGMA_SHIFT = 6.0
UNIFORM_SHARE = 0.3
# Fraction of the schedule from which on other frame sizes are used too.
OTHER_SIZES_FROM = 0.4
OTHER_SIZES_SHARE = 0.45
# Larger when refining, because a finished model already knows the default size.
REFINING_OTHER_SIZES_SHARE = 0.6
# {frames: share}. Short clips show more scenes, from which objects and their places are learned.
SHARES_OF_OTHER_SIZES = {17: 0.4, 33: 0.25, 65: 0.35}
# Seconds of rendering and encoding clips.
POOL_S = 25.0
OTHER_POOL_S, REFINING_OTHER_POOL_S = 4.0, 8.0
LARGE_POOL_S, REFINING_LARGE_POOL_S = 16.0, 50.0
SAVE_EVERY_S = 150.0
# Seconds reserved at the end of a call for saving.
RESERVE_S = 14.0
SIGMA_BINS = (0.0, 0.3, 0.6, 0.8, 0.9, 0.97, 1.001)


@dataclass(slots=True)
class Trainee:
    """Everything that a training step uses."""

    job: TrainingJob
    transformer: HunyuanVideoTransformer3DModel
    processor: TrainingProcessor
    pools: dict[Size, dict[int, LatentPool]]
    empty_prompt: tuple[Tensor, Tensor]
    rng: random.Random
    rotations: dict[tuple[int, ...], Tensor]


def run(job: TrainingJob) -> None:
    """Train for one call; write `transformer.ckpt.*`."""
    torch.manual_seed(job.seed)
    text = load_text_stack(job)
    transformer = build_transformer(job.plan.transformer)
    if job.start_from is not None:
        load_weights(transformer, job.start_from / "transformer")
    transformer = transformer.to(job.device).train()
    count = sum(parameter.numel() for parameter in transformer.parameters())
    job.log(f"transformer: {count / 1e6:.2f} M parameters")
    trained = TrainedWeights(
        [transformer],
        dtype=job.dtype,
        # As the working copies; the masters lose their lower bits only once per call.
        stored_dtype=torch.bfloat16,
        betas=(0.9, 0.98),
        weight_decay=0.02,
        ema_decay=0.998,
        matrices=_block_matrices(transformer),
        matrix_rate=MATRIX_RATE,
    )
    before, calls, history = 0.0, 0, []
    if job.resume:
        state = load_checkpoint(job.work_dir, "transformer")
        trained.load_state(state["weights"])
        before, calls, history = state["spent"], state["calls"], state["history"]

    rng = random.Random(f"{job.seed}/transformer/{calls}")
    planned = Clock.begin(job, before, RESERVE_S).planned_fraction
    trainee = Trainee(
        job=job,
        transformer=transformer,
        processor=use_training_attention(transformer),
        pools=_fill_all_pools(job, text, rng, with_others=planned > OTHER_SIZES_FROM),
        empty_prompt=text.encode(*text.tokenize([""], job.device)),
        rng=rng,
        rotations={},
    )
    _check_processor(trainee)
    if job.resume:
        restore_random_state(state["random"])

    clock = Clock.begin(job, before, 2.0 if job.is_smoke else RESERVE_S)
    job.log(f"training from {clock.fraction:.1%} to {clock.planned_fraction:.1%} of the schedule")
    _train(trainee, trained, clock, calls, history)
    save_stage(job, trained, clock, calls + 1, history)
    job.log(f"checkpoint saved at {clock.fraction:.1%} of the schedule")
    add_report(
        job.work_dir,
        {
            "stage": "transformer",
            "training_seconds": round(clock.spent - before, 1),
            "steps": trained.steps_since_start,
            "schedule_fraction": round(clock.fraction, 4),
            "losses": history[-1] if history else None,
        },
    )


def _block_matrices(transformer: HunyuanVideoTransformer3DModel) -> list[nn.Parameter]:
    """The matrices of the blocks' attention and feed-forward layers."""
    blocks = [*transformer.transformer_blocks, *transformer.single_transformer_blocks]
    return [
        parameter
        for block in blocks
        for name, parameter in block.named_parameters()
        # The modulation layers, called `norm`, begin with zeros.
        if parameter.ndim == 2 and not name.startswith("norm")
    ]


def _fill_all_pools(
    job: TrainingJob, text: TextStack, rng: random.Random, *, with_others: bool
) -> dict[Size, dict[int, LatentPool]]:
    """{frame size: {number of objects: pool}} for every size that this call needs."""
    plan, refining = job.plan, job.start_from is not None
    vae = load_vae(job)
    use_training_layers(vae)
    seconds = {plan.square: POOL_S}
    if with_others:
        seconds |= dict.fromkeys(
            (plan.wide, plan.tall), REFINING_OTHER_POOL_S if refining else OTHER_POOL_S
        )
        seconds[plan.large] = REFINING_LARGE_POOL_S if refining else LARGE_POOL_S
    if job.is_smoke:
        seconds = dict.fromkeys(seconds, 0.5)
    return {size: fill_pools(job, vae, text, rng, size, limit) for size, limit in seconds.items()}


def _draw_batch(trainee: Trainee, fraction: float) -> tuple[Tensor, Tensor, Tensor, str]:
    """Latents, prompt states, pooled states, and the name of the batch's kind."""
    plan, rng = trainee.job.plan, trainee.rng
    other_sizes_share = OTHER_SIZES_SHARE
    if trainee.job.start_from is not None:
        # A finished model has already been trained on short clips.
        fraction = 1.0
        other_sizes_share = REFINING_OTHER_SIZES_SHARE
    if fraction < 0.3:
        shares = {17: 1.0}
    elif fraction < 0.45:
        shares = {17: 0.35, 33: 0.65}
    else:
        shares = {17: 0.15, 33: 0.2, 65: 0.65}
    size = plan.square
    has_others = len(trainee.pools) > 1 and fraction >= OTHER_SIZES_FROM
    if has_others and rng.random() < other_sizes_share:
        size = rng.choices([plan.wide, plan.tall, plan.large], [1, 1, 3])[0]
        shares = SHARES_OF_OTHER_SIZES
    num_frames = rng.choices(list(shares), list(shares.values()))[0]
    count = (plan.large_batch_of if size == plan.large else plan.batch_of)[num_frames]
    prompt = rng.choices(["one", "two", "empty"], [0.6, 0.35, 0.05])[0]
    num_objects = 2 if prompt == "two" or (prompt == "empty" and rng.random() < 0.25) else 1
    pool = trainee.pools[size][num_objects]
    latents, states, pooled = pool.batch(count, (num_frames - 1) // 4 + 1)
    if prompt == "empty":
        states, pooled = (part.expand(count, *part.shape[1:]) for part in trainee.empty_prompt)
    return latents, states, pooled, f"{size[1]}x{size[0]}x{num_frames}"


def _loss(
    trainee: Trainee, latents: Tensor, states: Tensor, pooled: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean loss, each sample's loss and each sample's sigma."""
    count, device, dtype = len(latents), latents.device, trainee.job.dtype
    uniform = torch.rand(count, device=device)
    middling = torch.sigmoid(1.1 * torch.randn(count, device=device))
    u = torch.where(torch.rand(count, device=device) < UNIFORM_SHARE, uniform, middling)
    # Larger frames remain recognisable under more noise (arXiv:2403.03206, section 5.3.2).
    height, width = trainee.job.plan.square
    area = latents.shape[-2] * latents.shape[-1] * 8**2 / (height * width)
    shift = SIGMA_SHIFT * math.sqrt(area)
    sigma = (shift * u / (1 + (shift - 1) * u)).clamp(1e-3, 1)
    noise = torch.randn_like(latents)
    weight = sigma.view(-1, 1, 1, 1, 1)
    noisy = (1 - weight) * latents + weight * noise
    grid = tuple(latents.shape[2:])
    if grid not in trainee.rotations:
        trainee.rotations[grid] = rotation_of(trainee.transformer, latents)
    trainee.processor.rotation = trainee.rotations[grid]
    velocity = trainee.transformer(
        hidden_states=noisy.to(dtype),
        timestep=sigma * 1000,
        encoder_hidden_states=states,
        encoder_attention_mask=torch.ones(states.shape[:2], device=device, dtype=torch.long),
        pooled_projections=pooled,
        # Guidance has no meaning in training; random, so that any value is harmless later.
        guidance=torch.rand(count, device=device) * 9000 + 1000,
        return_dict=False,
    )[0]
    losses = (velocity.float() - (noise - latents)).square().mean((1, 2, 3, 4))
    return losses.mean(), losses, sigma


@torch.no_grad()
def _check_processor(trainee: Trainee) -> None:
    """Check that the training processor computes the same as the stock one."""
    transformer = trainee.transformer
    shaken = [p for p in transformer.parameters() if p.requires_grad]
    kept = [p.clone() for p in shaken]
    for parameter in shaken:
        parameter.add_(torch.randn_like(parameter) * 0.02)
    latents, states, pooled, _ = _draw_batch(trainee, fraction=0.0)
    blocks = [*transformer.transformer_blocks, *transformer.single_transformer_blocks]
    losses = {}
    for name, processor in (("stock", HunyuanVideoAttnProcessor2_0()), ("own", None)):
        for block in blocks:
            block.attn.set_processor(processor or trainee.processor)
        torch.manual_seed(trainee.job.seed)
        losses[name] = _loss(trainee, latents[:2], states[:2], pooled[:2])[0].item()
    for parameter, value in zip(shaken, kept, strict=True):
        parameter.copy_(value)
    trainee.job.log(f"loss by attention processor: {losses}")
    tolerance = 1e-4 if trainee.job.dtype == torch.float32 else 0.02
    assert abs(losses["own"] - losses["stock"]) <= tolerance * losses["stock"]


def _train(
    trainee: Trainee,
    trained: TrainedWeights,
    clock: Clock,
    calls: int,
    history: list[dict[str, Any]],
) -> None:
    job = trainee.job
    recent: list[tuple[Tensor, Tensor]] = []
    kinds: dict[str, int] = {}
    reported = saved = time.time()
    reported_step = trained.step_count
    graphs = StepGraphs(trained.parameters)
    while not clock.is_over:
        fraction = clock.fraction
        latents, states, pooled, kind = _draw_batch(trainee, fraction)
        _, losses, sigma = graphs.run(
            (latents.shape, states.shape), partial(_loss, trainee), latents, states, pooled
        )
        peak = LEARNING_RATE if job.start_from is None else REFINING_LEARNING_RATE
        trained.step(peak * _course(fraction), WARMUP_STEPS)
        recent.append((sigma, losses))
        kinds[kind] = kinds.get(kind, 0) + 1
        now = time.time()
        if now - reported >= job.plan.report_every:
            line: dict[str, Any] = _summary(recent)
            steps = trained.step_count - reported_step
            line |= {"step": trained.step_count, "fraction": round(clock.fraction, 4)}
            line |= {"ms_a_step": round((time.time() - reported) / steps * 1e3, 1)}
            history.append(line)
            job.log(f"transformer {line} {kinds}")
            recent, kinds = [], {}
            reported, reported_step = time.time(), trained.step_count
        if now - saved >= SAVE_EVERY_S:
            save_stage(job, trained, clock, calls + 1, history)
            saved = time.time()


def _course(fraction: float) -> float:
    """Factor of the learning rate: constant, then a cosine down to a hundredth."""
    course = max(0.0, (fraction - FLAT_UNTIL) / (1 - FLAT_UNTIL))
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * course))


def _summary(recent: list[tuple[Tensor, Tensor]]) -> dict[str, Any]:
    """Mean loss, overall and by sigma."""
    sigma, losses = (torch.cat(parts).cpu() for parts in zip(*recent, strict=True))
    by_sigma = {}
    for low, high in itertools.pairwise(SIGMA_BINS):
        inside = losses[(sigma >= low) & (sigma < high)]
        if len(inside):
            by_sigma[f"<{min(high, 1.0):g}"] = round(inside.mean().item(), 4)
    return {"loss": round(losses.mean().item(), 4), "by_sigma": by_sigma}
