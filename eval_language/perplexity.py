"""Measures the loss on plain text, which degrades before needle tests do; needs no harness.

python -m eval_language.perplexity --run runs/text --model model.gguf --tokens 4096

The demo model was trained only on RULER's texts; give it one of those with --text.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from eval_language.harness_output import Tick
from eval_language.harness_run import (
    HarnessOptions,
    Prepared,
    find_model,
    harness_command,
    model_loader,
)
from xattn_video.options.command import knob

if TYPE_CHECKING:
    from torch import Tensor

    from xattn_video.pipelines.loading import LoadOptions


@dataclass(frozen=True, slots=True)
class TextOptions(HarnessOptions):
    """The options of the loss on text."""

    tokens: int = knob("Tokens of a sample; the second half is scored.", 4096)
    text: Path | None = knob(
        "A text file.", shown_default="the manual that comes with Python", reads=True
    )


def tasks(asked: TextOptions) -> list[str]:
    """The only task."""
    return [f"loss, {asked.tokens}"]


def prepare(asked: TextOptions, load: "LoadOptions") -> Prepared:
    """Cut the text into samples."""
    from pydoc_data.topics import topics

    source = find_model(asked, asked.tokens)
    if asked.tokens < 2:
        raise ValueError(f"tokens must be at least 2, got {asked.tokens}; use 4096.")
    context = source.context
    if context is not None and asked.tokens > context:
        raise ValueError(
            f"the model's context is {context:,} tokens, got {asked.tokens:,}; use --tokens "
            f"{context} or fewer."
        )
    try:
        text = asked.text.read_text(encoding="utf-8") if asked.text else "\n".join(topics.values())
    except (OSError, UnicodeError) as error:
        raise ValueError(f"the text {str(asked.text)!r} cannot be read: {error}.") from None
    ids = torch.tensor(source.load_tokenizer()(text)["input_ids"])
    samples = ids.split(asked.tokens)[: asked.samples]
    if len(samples) * asked.tokens > len(ids):
        raise ValueError(
            f"the text has {len(ids):,} tokens, too few for {asked.samples} samples of "
            f"{asked.tokens:,}; use fewer --samples or --tokens."
        )

    def score(model: Any, tick: Tick) -> dict[str, float]:
        losses = {}
        for number, one in enumerate(samples):
            losses[str(number)] = _loss(model, one)
            tick()
        return losses

    scorers = dict.fromkeys(tasks(asked), ("text", score))
    return Prepared(scorers, model_loader(source, load))


@torch.inference_mode()
def _loss(model: Any, ids: "Tensor") -> float:
    """Mean loss of the tokens in the second half, in nats."""
    ids = ids.to(model.device)
    scored = len(ids) // 2
    out = model(ids[None], use_cache=False, logits_to_keep=scored + 1)
    return float(F.cross_entropy(out.logits[0, :-1].float(), ids[-scored:]))


app = harness_command("Text", None, TextOptions, tasks, prepare)

if __name__ == "__main__":
    app()
