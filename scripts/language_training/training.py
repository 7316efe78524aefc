"""The model, and its training through lengths that grow."""

import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim import Optimizer
from transformers import AttentionInterface, LlamaConfig, LlamaForCausalLM

from language_training.sequences import BEGIN, END, PADDING, VOCABULARY, Batch, Sequences, batches

CONTEXT = 32768


@dataclass(frozen=True, slots=True)
class Stage:
    """A part of the training.

    Attributes:
        share: Of the time that is left, beside the shares of the stages that follow.
        length: Tokens of a sequence.
        copies: Share of sequences that copy strings or needles.
        enough: Accuracy of the answers at which it ends before.
    """

    share: float
    length: int
    copies: float
    enough: float = 0.97


@dataclass(frozen=True, slots=True)
class LanguagePlan:
    """Sizes and times of a training."""

    hidden: int = 384
    feed_forward: int = 960
    layers: int = 6
    heads: int = 6
    key_heads: int = 2
    tokens: int = 32768
    learning_rate: float = 4e-3
    stages: tuple[Stage, ...] = (
        # Repeated random strings alone are not learned for long: the text of needles leads.
        Stage(60, 64, 1.0, enough=0.8),
        Stage(4, 128, 0.5),
        Stage(4, 256, 0.3),
        Stage(6, 512, 0.2),
        Stage(10, 1024, 0.1),
        Stage(8, 2048, 0.05),
        Stage(10, 4096, 0.05),
        Stage(14, 8192, 0.05),
        Stage(18, 16384, 0.05),
        Stage(30, 32768, 0.05, enough=2.0),
    )


# Goes on with a model that copies already.
LONGER = LanguagePlan(
    stages=(
        Stage(5, 512, 0.05),
        Stage(10, 2048, 0.05),
        Stage(20, 8192, 0.05),
        Stage(25, 16384, 0.05),
        Stage(40, 32768, 0.05, enough=2.0),
    )
)

SMOKE = LanguagePlan(
    hidden=128,
    feed_forward=320,
    layers=3,
    heads=4,
    key_heads=2,
    tokens=3072,
    learning_rate=3e-3,
    stages=(Stage(60, 64, 1.0, enough=0.7), Stage(30, 128, 0.4), Stage(10, 192, 0.2, enough=2)),
)


def make_model(plan: LanguagePlan) -> LlamaForCausalLM:
    """The model with fresh weights."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=plan.hidden,
        intermediate_size=plan.feed_forward,
        num_hidden_layers=plan.layers,
        num_attention_heads=plan.heads,
        num_key_value_heads=plan.key_heads,
        max_position_embeddings=CONTEXT,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        tie_word_embeddings=True,
        pad_token_id=PADDING,
        bos_token_id=BEGIN,
        eos_token_id=END,
    )
    return LlamaForCausalLM(config)


class FoldedAttention:
    """Causal attention of sequences that the model sees as one.

    All but attention works on single tokens. The model therefore gets the same number of tokens
    at every length, as one row, and its compiled layers never change.
    """

    def __init__(self, device: torch.device) -> None:
        self.length = 0
        self._backend = _fastest(device)

    @torch.compiler.disable
    def __call__(
        self, module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **options: Any
    ) -> tuple[Tensor, None]:
        """Attention of `[1, H, tokens, D]`; returns `[1, tokens, H, D]`."""
        query, key, value = (self._fold(one) for one in (query, key, value))
        with sdpa_kernel(self._backend):
            out = _attend(query, key, value)
        return out.transpose(1, 2).flatten(0, 1).unsqueeze(0), None

    def _fold(self, one: Tensor) -> Tensor:
        return one[0].transpose(0, 1).unflatten(0, (-1, self.length)).transpose(1, 2)


def _attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    groups = query.shape[1] // key.shape[1]
    key, value = (one.repeat_interleave(groups, 1) for one in (key, value))
    return F.scaled_dot_product_attention(query, key, value, is_causal=True)


def _fastest(device: torch.device) -> SDPBackend:
    """The faster of the two kernels that a GPU has, forward and backward."""
    if device.type == "cpu":
        return SDPBackend.FLASH_ATTENTION
    seconds = {}
    for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION):
        one = torch.randn(4, 6, 16384, 64, device=device, dtype=torch.bfloat16).requires_grad_()
        # A kernel that this build lacks is not the fastest.
        with suppress(RuntimeError), sdpa_kernel(backend):
            for _ in range(3):
                torch.cuda.synchronize()
                start = time.perf_counter()
                _attend(one, one, one).sum().backward()
                torch.cuda.synchronize()
            seconds[backend] = time.perf_counter() - start
    print(f"attention of 65,536 tokens: {seconds}", flush=True)
    return min(seconds, key=lambda backend: seconds[backend])


def make_optimizers(model: LlamaForCausalLM) -> list[Optimizer]:
    """Muon for the matrices of the layers, which learn to copy in a quarter of AdamW's steps."""
    layers = [one for one in model.model.layers.parameters() if one.dim() > 1]
    vectors = [one for one in model.parameters() if one.dim() == 1]
    embedding = model.get_input_embeddings().weight
    return [
        torch.optim.Muon(layers, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(
            [
                {"params": [embedding], "weight_decay": 0.1},
                {"params": vectors, "weight_decay": 0.0},
            ],
            betas=(0.9, 0.98),
            fused=embedding.is_cuda,
        ),
    ]


@dataclass(slots=True)
class Training:
    """What a training run holds.

    Attributes:
        folder: Where the tokenizer is, and the weights go.
        seconds: Of the whole training.
        workers: Processes that make sequences.
        compiled: Whether the layers are compiled.
    """

    plan: LanguagePlan
    folder: Path
    seconds: float
    workers: int
    device: torch.device
    compiled: bool

    def run(self, model: LlamaForCausalLM, save: Callable[[], None]) -> int:
        """Train a model; ``save`` is called at the end of each stage. Returns the steps."""
        attention = FoldedAttention(self.device)
        AttentionInterface.register("folded", attention)
        model.set_attn_implementation("folded")
        if self.compiled:
            for layer in model.model.layers:
                layer.compile()
        optimizers = make_optimizers(model)
        started = time.perf_counter()
        step, seen = 0, 0
        stages = self.plan.stages
        for number, (stage, data) in enumerate(self._stages()):
            latest: list[Tensor] = []
            begun = (time.perf_counter() - started) / self.seconds
            left = sum(one.share for one in stages[number:])
            until = begun + (1 - begun) * stage.share / left
            while (done := (time.perf_counter() - started) / self.seconds) < until:
                ids, answers = next(data)
                attention.length = ids.shape[1]
                rate = self.plan.learning_rate * _rate(step, done)
                latest.append(self._step(model, optimizers, rate, ids, answers))
                step, seen = step + 1, seen + ids.numel()
                if len(latest) == 25:
                    loss, accuracy = torch.stack(latest).mean(0).tolist()
                    latest.clear()
                    self._tell(step, stage, started, seen, loss, accuracy)
                    if accuracy >= stage.enough:
                        break
            save()
        return step

    def _stages(self) -> Iterator[tuple[Stage, Iterator[Batch]]]:
        learned: list[int] = []
        for stage in self.plan.stages:
            dataset = Sequences(
                self.folder, self.plan.tokens, stage.length, stage.copies, learned.copy()
            )
            yield stage, batches(dataset, self.workers)
            if stage.length not in learned:
                learned.append(stage.length)

    def _step(
        self,
        model: LlamaForCausalLM,
        optimizers: list[Optimizer],
        rate: float,
        ids: Tensor,
        answers: Tensor,
    ) -> Tensor:
        """One step of the optimizers; returns the answers' loss and accuracy, `[2]`."""
        rows, length = ids.shape
        positions = torch.arange(length).repeat(rows).unsqueeze(0)
        # The logits of a few tokens are needed alone; which, is known without the device.
        target = F.pad(ids[:, 1:], (0, 1)).flatten()
        answer = F.pad(answers[:, 1:], (0, 1)).flatten()
        other = (target != PADDING) & ~answer & (torch.rand(target.shape) < 0.1)
        places = [mask.nonzero()[:, 0] for mask in (answer, other)]
        moved = (ids.view(1, -1), positions, *places, *(target[one] for one in places))
        tokens, positions, at, other_at, wanted, other_wanted = (
            one.to(self.device, non_blocking=True) for one in moved
        )
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            hidden = model.model(
                tokens, position_ids=positions, use_cache=False
            ).last_hidden_state[0]
            logits = model.lm_head(hidden[at]).float()
            other_logits = model.lm_head(hidden[other_at]).float()
        loss = F.cross_entropy(logits, wanted)
        (loss + 0.3 * F.cross_entropy(other_logits, other_wanted)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        right = (logits.argmax(-1) == wanted).float().mean()
        return torch.stack((loss.detach(), right))

    def _tell(
        self, step: int, stage: Stage, started: float, seen: int, loss: float, accuracy: float
    ) -> None:
        seconds = time.perf_counter() - started
        print(
            f"{seconds:6.1f} s, step {step}, length {stage.length}: loss {loss:.3f}, "
            f"accuracy {accuracy:.3f}, {seen / seconds:,.0f} tokens/s",
            flush=True,
        )


def _rate(step: int, done: float) -> float:
    """The share of the learning rate: a warm-up, then constant, then a straight line down."""
    return min(1.0, (step + 1) / 50) * min(1.0, max(0.02, (1 - done) / 0.4))
