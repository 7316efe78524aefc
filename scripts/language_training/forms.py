"""RULER's forms, word for word as lm-evaluation-harness writes them, with more questions each.

A form is a list of pieces of text; each piece says whether it is an answer. The prompt, its
answer and the end of the text come first. More questions about the same text follow, because one
answer in a long text teaches little. Pieces begin where the tokenizer always splits, so that they
can be encoded one by one.
"""

import random
import string
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import pairwise

GRASS = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
_HEAD = (
    "{some} special magic {kind} {are} hidden within the following text. Make sure to memorize "
    "it. I will quiz you about the {kind} afterwards.\n"
)
_CHAINS_HEAD = (
    "Memorize and track the chain(s) of variable assignment hidden in the following text."
)
_CHAINS_ANSWER = (
    " Answer: According to the chain(s) of variable assignment in the text above, {count} "
    "variables are assgined the value {value}, they are:"
)
_CHAINS_QUESTION = (
    "\nQuestion: Find all variables that are assigned the value {value} in the text above."
)
_COMMON_HEAD = (
    "Below is a numbered list of words. In these words, some appear more often than others. "
    "Memorize the ones that appear most often.\n"
)
_COMMON_QUESTION = (
    "\nQuestion: What are the 10 most common words in the above list?\n\n"
    "Answer: The top 10 words that appear most often in the list are:"
)
_CODED_HEAD = (
    "Read the following coded text and track the frequency of each coded word. Find the three "
    "most frequently appeared coded words."
)
_CODED_QUESTION = (
    "\nQuestion: Do not provide any explanation. Please ignore the dots '....'. What are the "
    "three most frequently appeared words in the above coded text? Answer: According to the coded "
    "text above, the three most frequently appeared words are:"
)

_GRASS_TOKENS = 25.2
_ORDINALS = ("first", "second", "third", "fourth")


@dataclass(frozen=True, slots=True)
class Piece:
    """A piece of text, and whether the model has to give it."""

    text: str
    is_answer: bool = False


@cache
def _words() -> tuple[list[str], list[str], list[str]]:
    from wonderwords import RandomWord

    kinds = RandomWord()._categories
    every = sorted({word for kind in ("noun", "adjective", "verb") for word in kinds[kind]})
    return kinds["adjectives"], kinds["nouns"], every


def _word() -> str:
    adjectives, nouns, _ = _words()
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
        values: One value for each key, or all values of a single key in the order of the text.
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
        Piece(_answer(keys, values), True),
    ]


def _answer(keys: list[str], values: list[str]) -> str:
    """Return one value, or several, each after the words that precede it in the text."""
    if len(values) == 1:
        return f" {values[0]}"
    names = keys if len(keys) > 1 else [f"{number} {keys[0]}" for number in _ORDINALS]
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
    size, question = (25.5, 55) if numbers else (84.9, 145)
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
    pairs = [(key, _number()) for key in _distinct(_word, max(1, int(room / 54)))]
    pieces = [Piece(_magic("numbers", *pair) + "\n") for pair in pairs]
    random.shuffle(pairs)
    for key, value in pairs:
        pieces.append(Piece(_magic("numbers", key, "").removesuffix(" .")))
        pieces += [Piece(f" {value}", True), Piece(".\n")]
    return pieces


def few_keys(room: int) -> list[Piece]:
    """niah_single_1, niah_multivalue and niah_multiquery in a haystack that repeats."""
    values_each = random.choice((1, 4))
    keys = random.choice([count for count in (1, 1, 4, 4, 8, 16) if 100 * count < room])
    table = {key: [_number() for _ in range(values_each)] for key in _distinct(_word, keys)}
    needles = [(key, value) for key, values in table.items() for value in values]
    random.shuffle(needles)
    # Values of a key are asked for in the order of the text.
    found = {key: [value for other, value in needles if other == key] for key in table}
    questions: list[list[Piece]] = []
    while len(questions) < keys:
        together = 4 if values_each == 1 and keys >= 4 and random.random() < 0.5 else 1
        asked = random.sample(list(table), together)
        values = [value for key in asked for value in found[key]]
        questions.append(_ask("numbers", asked, values, short=bool(questions)))
    sentences = (room - 220) / _GRASS_TOKENS * random.uniform(0.6, 1.0) - len(needles)
    lines = [GRASS] * max(len(needles), int(sentences))
    places = sorted(random.sample(range(len(lines)), len(needles)), reverse=True)
    for place, needle in zip(places, reversed(needles), strict=True):
        lines.insert(place, _magic("numbers", *needle))
    return _needles("numbers", lines, questions)


def _chain_text(chains: list[list[str]], numbers: list[int], noises: int) -> str:
    sentences = [GRASS + "\n"] * noises
    for names, number in zip(chains, numbers, strict=True):
        said = [f"VAR {names[0]} = {number}"]
        said += [f"VAR {name} = VAR {last} " for last, name in pairwise(names)]
        places = sorted(random.sample(range(len(sentences)), len(said)))
        for shift, (place, one) in enumerate(zip(places, said, strict=True)):
            sentences.insert(place + shift, one)
    return " ".join(sentences).replace(". \n", ".\n")


def _names(length: int, count: int = 5) -> list[str]:
    return ["".join(random.choices(string.ascii_uppercase, k=length)) for _ in range(count)]


def variable_tracking(room: int) -> list[Piece]:
    """ruler_vt: an example, then chains of assignments in a haystack that repeats."""
    number, hidden = random.randint(10000, 99998), _names(3)
    noises = random.choice((5, 10))
    question = _CHAINS_QUESTION + _CHAINS_ANSWER
    pieces = [
        Piece(f"{_CHAINS_HEAD}\n\n"),
        Piece(_chain_text([hidden], [number], noises)),
        Piece(question.format(count=5, value=number) + "  " + " ".join(hidden) + "\n\n\n\n"),
        Piece(f"{_CHAINS_HEAD}\n\n"),
    ]
    chains = [_names(5) for _ in range(random.choice((1, 1, 2, 4)) if room > 1500 else 1)]
    values = random.sample(range(10000, 99999), len(chains))
    room -= 250 + 26 * noises + 220 * len(chains)
    pieces.append(
        Piece(_chain_text(chains, values, max(5, int(room / 26.1 * random.uniform(0.6, 1)))))
    )
    for chain, value in zip(chains, values, strict=True):
        pieces += [
            Piece(question.format(count=5, value=value)),
            Piece(" " + " ".join(chain), True),
        ]
    return pieces


def common_words(room: int) -> list[Piece]:
    """ruler_cwe: the words of a list that come most often, in the order of the list."""
    often, seldom = (30, 3) if room >= 4096 else (6, 1)
    others = ((room - 180) / 9 * random.uniform(0.7, 1) - 10 * often) / seldom
    words = random.sample(_words()[2], 10 + max(4, min(4000, int(others))))
    listed = words[:10] * often + words[10:] * seldom
    random.shuffle(listed)
    common = sorted(words[:10], key=listed.index)
    pieces = [Piece(_COMMON_HEAD)]
    pieces += [Piece(f"{' ' if n else ''}{n + 1}. {word}") for n, word in enumerate(listed)]
    pieces.append(Piece(_COMMON_QUESTION))
    answer = "".join(f" {n + 1}. {word}" for n, word in enumerate(common))
    return [*pieces, Piece(answer, True)]


def _coded_word() -> str:
    return "".join(random.choices(string.ascii_lowercase, k=6))


def coded_words(room: int) -> list[Piece]:
    """ruler_fwe: the three most frequent of made words, whose numbers fall as 1 / rank squared."""
    vocabulary = ["...", *(_coded_word() for _ in range(max(4, room // 50)))]
    total = (room - 120) / 2.5 * random.uniform(0.7, 1)
    listed = [
        word
        for rank, word in enumerate(vocabulary, 1)
        for _ in range(int(total * rank**-2 / 1.6449340668))
    ]
    random.shuffle(listed)
    pieces = [Piece(_CODED_HEAD), *(Piece(f" {word}") for word in listed), Piece(_CODED_QUESTION)]
    return [*pieces, Piece(" " + " ".join(vocabulary[1:4]), True)]


def many_uuids(room: int) -> list[Piece]:
    """niah_multikey_3."""
    return many_keys(room, "uuids")


# Each form, its share, and the tokens that it needs at least.
FORMS: dict[Callable[[int], list[Piece]], tuple[float, int]] = {
    many_keys: (0.26, 0),
    many_uuids: (0.16, 400),
    few_keys: (0.4, 256),
    variable_tracking: (0.1, 1000),
    common_words: (0.04, 1000),
    coded_words: (0.04, 400),
}


def random_form(room: int) -> list[Piece]:
    """A form that has about ``room`` tokens."""
    fitting = {form: share for form, (share, least) in FORMS.items() if room >= least}
    form = random.choices(list(fitting), list(fitting.values()))[0]
    return form(room)
