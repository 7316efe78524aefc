"""A long prompt of filler that hides a text and asks for it."""

from typing import Any

import torch
from torch import Tensor

_FILLER = (
    "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "
)
_HIDDEN = "The secret text is: {needle}. Remember the secret text. "
_QUESTION = "What is the secret text? The secret text is:"


def needle_prompt(tokenizer: Any, num_tokens: int, needle: str, depth: float) -> Tensor:
    """A prompt of exactly ``num_tokens`` tokens, int64 `[1, num_tokens]`.

    Args:
        tokenizer: The model's.
        num_tokens: The length.
        needle: The text to hide.
        depth: Where it lies in the filler, 0 for the beginning and 1 for the end.

    Raises:
        ValueError: The prompt is too short for the needle and the question.
    """
    filler = _encode(tokenizer, _FILLER)
    hidden = _encode(tokenizer, _HIDDEN.format(needle=needle))
    question = _encode(tokenizer, _QUESTION)
    begin = _beginning(tokenizer)
    room = num_tokens - len(begin) - len(hidden) - len(question)
    if room < 0:
        raise ValueError(
            f"tokens must be at least {num_tokens - room} to hide this needle and ask for it, "
            f"got {num_tokens}."
        )
    # Between two sentences.
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
    """Tokens to generate for an answer that holds the needle."""
    return len(_encode(tokenizer, needle)) + 8


def _encode(tokenizer: Any, text: str) -> list[int]:
    tokens: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return tokens


def _beginning(tokenizer: Any) -> list[int]:
    """What the tokenizer puts before a text, such as a token that begins the sequence."""
    bare, whole = _encode(tokenizer, _FILLER), tokenizer(_FILLER)["input_ids"]
    return whole[: -len(bare)] if whole[-len(bare) :] == bare else []


def _repeated(tokens: list[int], length: int) -> list[int]:
    return (tokens * (length // len(tokens) + 1))[:length]
