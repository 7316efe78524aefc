"""A long prompt of filler text that hides a needle and asks for it."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_GRASS = (
    "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
)


@dataclass(frozen=True, slots=True)
class _Form:
    """The head of the prompt, its filler, the sentence with the needle, and the question."""

    head: str
    filler: str
    hidden: str
    question: str


_TEXT = _Form(
    head="",
    filler=f"{_GRASS} ",
    hidden="The secret text is: {needle}. Remember the secret text. ",
    question="What is the secret text? The secret text is:",
)
# RULER's niah_single_1, word for word; the demo model was trained on this wording only.
_ASKED = "special magic number for quick-lantern mentioned in the provided text"
_NUMBER = _Form(
    head="A special magic number is hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the number afterwards.",
    filler=f"\n{_GRASS}",
    hidden="\nOne of the special magic numbers for quick-lantern is: {needle}.",
    question=f"\nWhat is the {_ASKED}? The {_ASKED} is",
)


def needle_prompt(tokenizer: Any, num_tokens: int, needle: str, depth: float) -> Tensor:
    """A prompt of exactly ``num_tokens`` tokens, int64 `[1, num_tokens]`.

    Args:
        tokenizer: The tokenizer of the model.
        num_tokens: Tokens of the prompt.
        needle: The text to hide; for a number the prompt has RULER's wording.
        depth: Position of the needle in the filler, from 0 (beginning) to 1 (end).

    Raises:
        ValueError: The prompt is too short for the needle and the question.
    """
    form = _NUMBER if needle.isdecimal() else _TEXT
    filler = _encode(tokenizer, form.filler)
    hidden = _encode(tokenizer, form.hidden.format(needle=needle))
    question = _encode(tokenizer, form.question)
    begin = _beginning(tokenizer) + _encode(tokenizer, form.head)
    room = num_tokens - len(begin) - len(hidden) - len(question)
    if room < 0:
        raise ValueError(
            f"tokens must be at least {num_tokens - room} to hide this needle and ask for it, "
            f"got {num_tokens}."
        )
    # The needle goes between two sentences.
    before = int(depth * room) // len(filler) * len(filler)
    tokens = [
        *begin,
        *_repeated(filler, before),
        *hidden,
        *_repeated(filler, room - before),
        *question,
    ]
    return torch.tensor([tokens])


def answer_tokens(tokenizer: Any, needle: str) -> int:
    """Number of tokens to generate for an answer that contains the needle."""
    return len(_encode(tokenizer, needle)) + 8


def _encode(tokenizer: Any, text: str) -> list[int]:
    tokens: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return tokens


def _beginning(tokenizer: Any) -> list[int]:
    """The tokens that the tokenizer puts before a text, such as a begin-of-sequence token."""
    bare, whole = _encode(tokenizer, _GRASS), tokenizer(_GRASS)["input_ids"]
    return whole[: -len(bare)] if whole[-len(bare) :] == bare else []


def _repeated(tokens: list[int], length: int) -> list[int]:
    return (tokens * (length // len(tokens) + 1))[:length]
