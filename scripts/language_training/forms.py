"""RULER's forms, word for word as lm-evaluation-harness writes them, with more questions each.

A form is a list of pieces of text; each piece says whether it is an answer. The prompt, its
answer and the end of the text come first. More questions about the same text follow, because one
answer in a long text teaches little. Pieces begin where the tokenizer always splits, so that they
can be encoded one by one.
"""

import random
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

GRASS = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
_HEAD = (
    "{some} special magic {kind} {are} hidden within the following text. Make sure to memorize "
    "it. I will quiz you about the {kind} afterwards.\n"
)

_GRASS_TOKENS, _NEEDLE_TOKENS = 25.2, 22.5
_ORDINALS = ("first", "second", "third", "fourth")


@dataclass(frozen=True, slots=True)
class Piece:
    """A piece of text.

    Attributes:
        text: Of the piece.
        is_answer: Whether the model has to give it.
        any_order: Whether the values of the answer may come in any order.
    """

    text: str
    is_answer: bool = False
    any_order: bool = False


@cache
def _words() -> tuple[list[str], list[str]]:
    from wonderwords import RandomWord

    kinds = RandomWord()._categories
    return kinds["adjectives"], kinds["nouns"]


def _word() -> str:
    adjectives, nouns = _words()
    return f"{random.choice(adjectives)}-{random.choice(nouns)}"


def _number() -> str:
    return str(random.randint(1_000_000, 9_999_999))


def _uuid() -> str:
    return str(uuid.UUID(int=random.getrandbits(128), version=4))


def _distinct(make: Callable[[], str], count: int) -> list[str]:
    """Made names, none of which comes twice: a key that did would have two answers."""
    names: dict[str, None] = {}
    while len(names) < count:
        names[make()] = None
    return list(names)


def _magic(kind: str, key: str, value: str) -> str:
    return f"One of the special magic {kind} for {key} is: {value}."


def _ask(kind: str, keys: list[str], values: list[str], *, short: bool) -> list[Piece]:
    """Return a question and its answer.

    Args:
        kind: What the values are: numbers or uuids.
        keys: The keys that are asked for.
        values: One value for each key, or all values of a single key.
        short: Leave the question out and begin with the answer's first words.
    """
    query = ", ".join(keys[:-1]) + ", and " + keys[-1] if len(keys) > 1 else keys[0]
    if len(values) == 1:
        begin, what, end = "What is", f"special magic {kind[:-1]}", "is"
    else:
        begin, what, end = "What are all", f"special magic {kind}", "are"
    asked = f"for {query} mentioned in the provided text"
    question = "" if short else f"{begin} the {what} {asked}? "
    return [
        Piece(f"\n{question}The {what} {asked} {end}"),
        Piece(_answer(keys, values), True, any_order=len(values) > len(keys)),
    ]


def _answer(keys: list[str], values: list[str]) -> str:
    """Return one value, or several, each after the words that precede it in the text."""
    if len(values) == 1:
        return f" {values[0]}"
    names = (
        keys if len(keys) > 1 else [f"{number} {keys[0]}" for number in _ORDINALS[: len(values)]]
    )
    return ",".join(f" {name} is: {value}" for name, value in zip(names, values, strict=True))


def _needles(kind: str, lines: list[str], questions: list[list[Piece]]) -> list[Piece]:
    """A haystack whose first question decides how the text begins."""
    one = ", " not in questions[0][1].text
    some, be, kinds = ("A", "is", kind[:-1]) if one else ("Some", "are", kind)
    pieces = [Piece(_HEAD.format(some=some, kind=kinds, are=be)), Piece(lines[0])]
    pieces += [Piece("\n" + line) for line in lines[1:]]
    return pieces + [piece for question in questions for piece in question]


def many_keys(room: int, kind: str = "numbers") -> list[Piece]:
    """niah_multikey_2 with numbers, niah_multikey_3 with uuids: every sentence is a needle."""
    numbers = kind == "numbers"
    make, key = (_number, _word) if numbers else (_uuid, _uuid)
    size, question = (_NEEDLE_TOKENS, 50) if numbers else (84.9, 145)
    count = max(1, int((room - 45 - question) / size * random.uniform(0.5, 0.99)))
    pairs = [(one, make()) for one in _distinct(key, count)]
    lines = [_magic(kind, *pair) for pair in pairs]
    # A short question is about as long as a needle.
    asked = random.sample(pairs, min(count, int(room / size) - count + 1))
    questions = [
        _ask(kind, [one], [value], short=index > 0) for index, (one, value) in enumerate(asked)
    ]
    return _needles(kind, lines, questions)


def copied_needles(room: int) -> list[Piece]:
    """Needles, and the same ones in another order: what questions about them ask, made plain."""
    pairs = [(key, _number()) for key in _distinct(_word, max(1, int(room / 48)))]
    pieces = [Piece(_magic("numbers", *pair) + "\n") for pair in pairs]
    random.shuffle(pairs)
    for key, value in pairs:
        pieces.append(Piece(_magic("numbers", key, "").removesuffix(" .")))
        pieces += [Piece(f" {value}", True), Piece(".\n")]
    return pieces


def one_key(room: int) -> list[Piece]:
    """niah_single_1: one value for each key."""
    return _few_keys(room, values_each=1, together=1)


def several_values(room: int) -> list[Piece]:
    """niah_multivalue: four values for each key, fewer in a short text."""
    # RULER asks for one key; several keep the model from counting any needle.
    most = 1 if random.random() < 0.6 else 32
    return _few_keys(room, values_each=min(4, room // 100), together=1, most=most)


def several_keys(room: int) -> list[Piece]:
    """niah_multiquery: one value for each key, and four keys in a question."""
    return _few_keys(room, values_each=1, together=4)


def _few_keys(room: int, *, values_each: int, together: int, most: int = 32) -> list[Piece]:
    """Keys and their values in a haystack that repeats."""
    # A needle, a sentence of the haystack, the value in the answer, and the question.
    size = 62 * values_each + 25
    most = max(together, min(most, (room - 110) // size))
    keys = random.choice([count for count in (1, 4, 8, 16, 32) if together <= count <= most])
    table = {key: [_number() for _ in range(values_each)] for key in _distinct(_word, keys)}
    needles = [(key, value) for key, values in table.items() for value in values]
    random.shuffle(needles)
    questions: list[list[Piece]] = []
    while len(questions) < keys // together:
        asked = random.sample(list(table), together)
        values = [value for key in asked for value in table[key]]
        questions.append(_ask("numbers", asked, values, short=bool(questions)))
    taken = 110 + 38 * len(needles) + 25 * len(questions)
    sentences = (room - taken) / _GRASS_TOKENS * random.uniform(0.7, 1.0)
    lines = [GRASS] * max(len(needles), int(sentences))
    places = sorted(random.sample(range(len(lines)), len(needles)), reverse=True)
    for place, needle in zip(places, reversed(needles), strict=True):
        lines.insert(place, _magic("numbers", *needle))
    return _needles("numbers", lines, questions)


def many_uuids(room: int) -> list[Piece]:
    """niah_multikey_3."""
    return many_keys(room, "uuids")


# Each form, its share, and the tokens that it needs at least. Chains of variables and counted
# words are not learned at this size, and their large losses hide those of the other forms.
FORMS: dict[Callable[[int], list[Piece]], tuple[float, int]] = {
    many_keys: (0.18, 0),
    many_uuids: (0.22, 400),
    one_key: (0.06, 256),
    several_values: (0.42, 260),
    several_keys: (0.12, 420),
}


def random_form(room: int) -> list[Piece]:
    """A form that has about ``room`` tokens."""
    fitting = {form: share for form, (share, least) in FORMS.items() if room >= least}
    form = random.choices(list(fitting), list(fitting.values()))[0]
    return form(room)
