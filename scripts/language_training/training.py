"""The model, and its training through lengths that grow."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from language_training.sequences import BEGIN, END, PADDING, VOCABULARY, Batch, Sequences, batches
from language_training.training_step import TrainingStep

CONTEXT = 32768


@dataclass(frozen=True, slots=True)
class Stage:
    """A part of the training.

    Attributes:
        share: Of the time that is left, beside the shares of the stages that follow.
        length: Tokens of a sequence.
        copies: Share of sequences that copy strings or needles.
        enough: Accuracy of the answers at which it ends before.
        entropy: What a nat of the attention's mean entropy counts in the loss.
    """

    share: float
    length: int
    copies: float
    enough: float = 0.985
    entropy: float = 0.0


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
        # Mostly many keys: that a value belongs to its key is learned before anything else.
        Stage(20, 256, 0.3, enough=0.99),
        # That a key has several values is learned slowly, and best in short texts.
        Stage(22, 512, 0.1, enough=0.998),
        Stage(8, 1024, 0.1, enough=0.998),
        Stage(10, 2048, 0.05, enough=0.998),
        Stage(16, 8192, 0.05, enough=0.998),
        Stage(10, 16384, 0.05, enough=0.998),
        Stage(34, 32768, 0.05, enough=2.0),
    )


# Goes on with a model that answers already. Heads without a task look at every token alike, and
# no block could be left out. With the entropy in the loss they look at few; the answers stay.
LONGER = LanguagePlan(
    learning_rate=2e-3,
    stages=(
        Stage(5, 512, 0.05, enough=2.0),
        Stage(7, 1024, 0.05, enough=2.0),
        Stage(10, 2048, 0.05, enough=2.0, entropy=0.02),
        Stage(12, 4096, 0.05, enough=2.0, entropy=0.02),
        Stage(14, 8192, 0.05, enough=2.0, entropy=0.02),
        Stage(17, 16384, 0.05, enough=2.0, entropy=0.02),
        Stage(35, 32768, 0.05, enough=2.0, entropy=0.02),
    ),
)

SMOKE = LanguagePlan(
    hidden=128,
    feed_forward=320,
    layers=3,
    heads=4,
    key_heads=2,
    tokens=3072,
    learning_rate=3e-3,
    stages=(Stage(60, 64, 1.0, enough=0.7), Stage(30, 256, 0.4), Stage(10, 384, 0.2, enough=2)),
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
        learn = TrainingStep(model, self.plan.tokens, self.device)
        if self.compiled:
            for layer in model.model.layers:
                layer.compile()
        started = time.perf_counter()
        step, seen = 0, 0
        stages = self.plan.stages
        for number, (stage, data) in enumerate(self._stages()):
            latest: list[Tensor] = []
            begun = (time.perf_counter() - started) / self.seconds
            left = sum(one.share for one in stages[number:])
            until = begun + (1 - begun) * stage.share / left
            while (done := (time.perf_counter() - started) / self.seconds) < until:
                rate = self.plan.learning_rate * _rate(step, done)
                latest.append(learn(next(data), rate, stage.entropy))
                step, seen = step + 1, seen + self.plan.tokens
                if len(latest) == 25:
                    means = torch.stack(latest).mean(0).tolist()
                    latest.clear()
                    self._tell(step, stage, started, seen, means)
                    if means[1] >= stage.enough:
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

    def _tell(
        self, step: int, stage: Stage, started: float, seen: int, means: list[float]
    ) -> None:
        seconds = time.perf_counter() - started
        loss, accuracy, entropy = means
        print(
            f"{seconds:6.1f} s, step {step}, length {stage.length}: loss {loss:.3f}, "
            f"accuracy {accuracy:.3f}, entropy {entropy:.2f}, {seen / seconds:,.0f} tokens/s",
            flush=True,
        )


def _rate(step: int, done: float) -> float:
    """The share of the learning rate: a warm-up, then constant, then a straight line down."""
    return min(1.0, (step + 1) / 50) * min(1.0, max(0.02, (1 - done) / 0.4))
