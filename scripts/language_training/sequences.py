"""Batches of token sequences: repeated random strings, and RULER's forms."""

import random
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from language_training.forms import GRASS, Piece, copied_needles, random_form

VOCABULARY = 2048
PADDING, BEGIN, END = 0, 1, 2
# Shorter texts have one needle, which is found without its key.
_SHORTEST_FORM = 256


class Batch(NamedTuple):
    """Sequences of one length, side by side in a row.

    Attributes:
        length: Tokens of a sequence.
        ids: Tokens, `[1, tokens]`.
        shares: What the prediction of each next token counts in the loss of answers and in that
            of other tokens, `[2, tokens]` float32; the sum of each row is 1.
        others: Tokens that are as right as the next one, `[3, tokens]`; padding where there are
            fewer.
    """

    length: int
    ids: Tensor
    shares: Tensor
    others: Tensor


class Encoded(NamedTuple):
    """The tokens of a text.

    Attributes:
        ids: Tokens.
        answers: Which of them belong to answers.
        others: By place of a token, the tokens that are as right there.
    """

    ids: list[int]
    answers: list[bool]
    others: dict[int, list[int]]


def train_tokenizer(folder: Path, samples: int) -> None:
    """Learn byte pairs from the forms; capitals and the signs of uuids stay single.

    The seven digits of a value become three pairs and a digit, so that its first token tells it
    from most other values.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    word = r"[A-Z]?[a-z]+(?![0-9A-Za-z])"
    pairs = "|".join(
        rf"(?<= [0-9]{{{start}}})[0-9]{{2}}(?=[0-9]{{{5 - start}}}(?![-0-9A-Za-z]))"
        for start in (0, 2, 4)
    )
    split = rf"{pairs}| {word}|(?<![0-9A-Za-z]){word}|[0-9A-Za-z]| ?[^\sA-Za-z0-9]+|\s"
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(split), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    forms = (random_form(1500) for _ in range(samples))
    tokenizer.train_from_iterator(("".join(p.text for p in form) for form in forms), trainer)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)


class Encoder:
    """Encodes forms, piece by piece."""

    def __init__(self, folder: Path) -> None:
        from tokenizers import Tokenizer

        self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self._grass = self._tokenizer.encode("\n" + GRASS).ids
        vocabulary = self._tokenizer.get_vocab()
        self._space = self._tokenizer.encode(" 1").ids[0]
        self._digits = {place for token, place in vocabulary.items() if token.isdecimal()}

    def encode(self, pieces: list[Piece]) -> Encoded:
        """Tokens of a text; an answer ends it."""
        grass = "\n" + GRASS
        encoded = iter(
            self._tokenizer.encode_batch_fast([p.text for p in pieces if p.text != grass])
        )
        text = Encoded([], [], {})
        for piece in pieces:
            new = self._grass if piece.text == grass else next(encoded).ids
            if piece.is_answer:
                new = [*new, END]
            if piece.any_order:
                values = [at for at in range(1, len(new)) if self._begins_value(new, at)]
                for index, at in enumerate(values):
                    later = {new[other] for other in values[index + 1 :]} - {new[at]}
                    text.others[len(text.ids) + at] = sorted(later)
            text.ids.extend(new)
            text.answers.extend([piece.is_answer] * len(new))
        return text

    def _begins_value(self, ids: list[int], at: int) -> bool:
        return ids[at - 1] == self._space and ids[at] in self._digits


def repeated(length: int) -> Encoded:
    """A random string, then again, whole or as pieces in another order."""
    count = random.randrange(8, length // 2 + 1)
    few = random.random() < 0.3
    first = np.random.randint(3, 40 if few else VOCABULARY, count).tolist()
    if random.random() < 0.5:
        return Encoded(first + first, [False] * (count + 1) + [True] * (count - 1), {})
    size = random.randrange(4, 9)
    pieces = [first[i : i + size] for i in range(0, count, size)]
    random.shuffle(pieces)
    known = [at > 1 for piece in pieces for at in range(len(piece))]
    again = [one for piece in pieces for one in piece]
    return Encoded(first + again, [False] * count + known, {})


class Sequences(IterableDataset[Batch]):
    """Endless batches of sequences.

    Args:
        folder: Of the tokenizer.
        tokens: Of a batch.
        length: Tokens of a sequence.
        copies: Share of sequences that copy: half are repeated strings, half needles.
        shorter: Lengths learned before, which some batches have.
    """

    def __init__(
        self, folder: Path, tokens: int, length: int, copies: float, shorter: list[int]
    ) -> None:
        self._folder, self._tokens, self._length = folder, tokens, length
        self._copies, self._shorter = copies, shorter

    def __iter__(self) -> Iterator[Batch]:
        """Endless."""
        seed = torch.initial_seed() % 2**32
        random.seed(seed)
        np.random.seed(seed)
        encoder = Encoder(self._folder)
        while True:
            length = self._length
            if self._shorter and random.random() < 0.15:
                length = random.choice(self._shorter)
            yield self._batch(encoder, length)

    def _batch(self, encoder: Encoder, length: int) -> Batch:
        rows = self._tokens // length
        ids = np.zeros((rows, length + 1), np.int64)
        answers = np.zeros((rows, length + 1), bool)
        others = np.full((3, rows, length + 1), PADDING)
        for row in range(rows):
            one = self._sequence(encoder, length)
            size = min(len(one.ids), length)
            ids[row, :size] = one.ids[:size]
            answers[row, :size] = one.answers[:size]
            for place, some in one.others.items():
                if place < size:
                    others[: len(some), row, place] = some
        answer = answers[:, 1:]
        other = (ids[:, 1:] != PADDING) & ~answer & (np.random.random(answer.shape) < 0.1)
        shares = np.stack([one / max(1, one.sum()) for one in (answer.ravel(), other.ravel())])
        return Batch(
            length,
            torch.from_numpy(ids[:, :length].reshape(1, -1)),
            torch.from_numpy(shares.astype(np.float32)),
            torch.from_numpy(others[:, :, 1:].reshape(3, -1)),
        )

    def _sequence(self, encoder: Encoder, length: int) -> Encoded:
        if length < _SHORTEST_FORM or random.random() < self._copies:
            if random.random() < 0.5:
                return repeated(min(length, 1024))
            return encoder.encode(copied_needles(min(length, 1024)))
        text = encoder.encode(random_form(length))
        # A text that came out too long loses its first question before its head.
        while not any(text.answers[:length]):
            text = encoder.encode(random_form(int(length * 0.8)))
        return text


def batches(dataset: Sequences, workers: int) -> Iterator[Batch]:
    """The batches, made by several processes."""
    options = {"prefetch_factor": 4, "multiprocessing_context": "fork"} if workers else {}
    return iter(
        DataLoader(dataset, batch_size=None, num_workers=workers, pin_memory=False, **options)
    )
