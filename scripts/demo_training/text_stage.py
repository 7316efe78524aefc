"""Trains the text encoders to represent the prompt, before the transformer reads them.

With the transformer's loss alone they remain close to bags of words, in which "left to right"
equals "right to left", and two objects may swap their colours. Here linear heads, used nowhere
else, read each object's place, colour, shape and motion from the states of its own words, and the
whole scene from the prompt's end and from the pooled state.
"""

import itertools
import math
import random
import time
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from demo_training.models import TextStack, build_text_stack
from demo_training.training_plan import Clock, TrainingJob
from demo_training.weights import add_report, load_weights, save_state
from xattn_video.pipelines.demo.grammar import (
    BACKGROUNDS,
    COLOURS,
    MOTIONS,
    SHAPES,
    Scene,
    sample_scene,
)

TEXT_FILE = "text.pt"
LEARNING_RATE = 1e-3
WARMUP_STEPS = 50
BATCH = 64
EVAL_PROMPTS = 512
RESERVE_S = 10.0
IGNORED = -100
# Choices for an object's place, colour, shape and motion; a whole scene has the background too.
_OBJECT_CHOICES = (2, len(COLOURS), len(SHAPES), len(MOTIONS))
_SCENE_CHOICES = (*_OBJECT_CHOICES[1:], *_OBJECT_CHOICES[1:], len(BACKGROUNDS))
# Of an object's seven words ("a red circle moving left to right"), the first to tell each part.
_FIRST_WORD = (0, 1, 2, 6)
_WORDS = 7


class Heads(nn.Module):
    """Linear heads on the states, discarded after training."""

    def __init__(self, width: int, pooled_width: int) -> None:
        super().__init__()
        self.of_object = nn.Linear(width, sum(_OBJECT_CHOICES))
        self.of_scene = nn.Linear(width, sum(_SCENE_CHOICES))
        self.of_pooled = nn.Linear(pooled_width, sum(_SCENE_CHOICES))


def run(job: TrainingJob) -> None:
    """Train both text encoders for one call; write `text.pt`."""
    torch.manual_seed(job.seed)
    text = build_text_stack()
    encoders = [text.text_encoder, text.text_encoder_2]
    for encoder in encoders:
        encoder.to(job.device).train()
    config, config_2 = text.text_encoder.config, text.text_encoder_2.config
    heads = Heads(config.hidden_size, config_2.hidden_size).to(job.device)
    parameters = [p for module in (*encoders, heads) for p in module.parameters()]
    optimiser = torch.optim.AdamW(parameters, lr=0.0, betas=(0.9, 0.98), weight_decay=0.01)
    rng = random.Random(f"{job.seed}/text")
    clock = Clock.begin(job, 0.0, 1.0 if job.is_smoke else RESERVE_S)
    step, reported = 0, time.time()
    while not clock.is_over:
        loss = _loss(text, heads, [_random_scene(rng, step) for _ in range(BATCH)], job.device)
        loss.backward()
        step += 1
        course = 0.5 * (1 + math.cos(math.pi * clock.fraction))
        for group in optimiser.param_groups:
            group["lr"] = LEARNING_RATE * min(1.0, step / WARMUP_STEPS) * course
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        optimiser.zero_grad()
        if time.time() - reported >= job.plan.report_every:
            reported = time.time()
            job.log(f"text step {step}, loss {loss.item():.4f}, {clock.fraction:.0%}")
    shares = measure_readings(text, heads, job)
    job.log(f"read right from held-out prompts: {shares}")
    _save(text, job)
    add_report(
        job.work_dir,
        {
            "stage": "text",
            "training_seconds": round(clock.spent, 1),
            "steps": step,
            "read_right": shares,
        },
    )


def load_text_stack(job: TrainingJob) -> TextStack:
    """Both tokenizers and the trained encoders, frozen, as they will be shipped.

    The encoders come from `text.pt`. If that is missing and a finished model is refined, they come
    from the model and are written to `text.pt`.
    """
    path = job.work_dir / TEXT_FILE
    text = build_text_stack()
    encoders = {"text_encoder": text.text_encoder, "text_encoder_2": text.text_encoder_2}
    if path.is_file():
        states = torch.load(path, map_location="cpu", weights_only=True)
        for encoder, state in zip(encoders.values(), states, strict=True):
            encoder.load_state_dict(state)
    elif job.start_from is not None:
        for name, encoder in encoders.items():
            load_weights(encoder, job.start_from / name)
        _save(text, job)
    else:
        raise FileNotFoundError(f"{path} is missing; run the text stage first.")
    for encoder in encoders.values():
        encoder.requires_grad_(False).eval().to(job.device, job.dtype)
    return text


def _save(text: TextStack, job: TrainingJob) -> None:
    encoders = (text.text_encoder, text.text_encoder_2)
    save_state(job.work_dir / TEXT_FILE, [encoder.state_dict() for encoder in encoders])


@torch.no_grad()
def measure_readings(text: TextStack, heads: Heads, job: TrainingJob) -> dict[str, float]:
    """{kind of reading: share of held-out prompts of which every part is read right}."""
    rng = random.Random(f"{job.seed}/text/held-out")
    count = BATCH if job.is_smoke else EVAL_PROMPTS
    right: dict[str, list[Tensor]] = {}
    for index in range(count // BATCH):
        scenes = [_random_scene(rng, index, held_out=True) for _ in range(BATCH)]
        for name, logits, targets, choices in _readings(text, heads, scenes, job.device):
            per_part = [
                (part.argmax(-1) == wanted) | (wanted == IGNORED)
                for part, wanted in zip(logits.split(choices, -1), targets.unbind(-1), strict=True)
            ]
            right.setdefault(name, []).append(torch.stack(per_part).all(0).flatten().float())
    return {name: round(torch.cat(rows).mean().item(), 4) for name, rows in right.items()}


def _random_scene(rng: random.Random, step: int, *, held_out: bool = False) -> Scene:
    """A random scene; every other batch has two objects, as prompts of a batch have one length."""
    return sample_scene(rng, 1 + step % 2, held_out=held_out)


def _loss(text: TextStack, heads: Heads, scenes: Sequence[Scene], device: torch.device) -> Tensor:
    """Mean cross entropy over all readings."""
    losses = []
    for _, logits, targets, choices in _readings(text, heads, scenes, device):
        for part, wanted in zip(logits.split(choices, -1), targets.unbind(-1), strict=True):
            if (wanted != IGNORED).any():
                losses.append(F.cross_entropy(part.flatten(0, -2), wanted.flatten()))
    return torch.stack(losses).mean()


def _readings(
    text: TextStack, heads: Heads, scenes: Sequence[Scene], device: torch.device
) -> list[tuple[str, Tensor, Tensor, tuple[int, ...]]]:
    """Name, logits ``[B, ..., sum of choices]``, targets ``[B, ..., parts]`` and choices."""
    states, pooled = text.encode(*text.tokenize([scene.prompt for scene in scenes], device))
    num_objects = len(scenes[0].objects)
    # The template has one more token before the prompt, and "and" is between two objects.
    first_words = [1 + index * (_WORDS + 1) for index in range(num_objects)]
    of_objects = torch.cat([states[:, first : first + _WORDS] for first in first_words], dim=1)
    object_targets = torch.tensor([_object_targets(scene) for scene in scenes], device=device)
    scene_targets = torch.tensor([_scene_targets(scene) for scene in scenes], device=device)
    return [
        ("words", heads.of_object(of_objects), object_targets, _OBJECT_CHOICES),
        ("end", heads.of_scene(states[:, -1]), scene_targets, _SCENE_CHOICES),
        ("pooled", heads.of_pooled(pooled), scene_targets, _SCENE_CHOICES),
    ]


def _object_targets(scene: Scene) -> list[list[int]]:
    """Targets for each word of the objects' phrases: the parts told by it and words before it."""
    rows = []
    for place, item in enumerate(scene.objects):
        parts = (place, *_choices_of(item.colour, item.shape, item.motion))
        for word in range(_WORDS):
            known = [word >= first for first in _FIRST_WORD]
            rows.append([p if k else IGNORED for p, k in zip(parts, known, strict=True)])
    return rows


def _scene_targets(scene: Scene) -> list[int]:
    objects = [_choices_of(item.colour, item.shape, item.motion) for item in scene.objects]
    objects += [(IGNORED,) * 3] * (2 - len(objects))
    background = tuple(BACKGROUNDS).index(scene.background)
    return [*itertools.chain.from_iterable(objects), background]


def _choices_of(colour: str, shape: str, motion: str) -> tuple[int, int, int]:
    return tuple(COLOURS).index(colour), SHAPES.index(shape), MOTIONS.index(motion)
