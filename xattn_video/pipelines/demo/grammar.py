"""The demo model's language: scenes of coloured shapes that move, and the prompts that name them.

A prompt reads "a red circle moving left to right over a blue background", or, with two objects,
"a red circle moving left to right and a green ring growing small to large on a gray background".
Every choice takes the same number of words, so prompts of one kind have one token count.
"""

import itertools
import random
import re
import zlib
from dataclasses import dataclass

SHAPES = ("circle", "square", "triangle", "ring")
COLOURS: dict[str, tuple[float, float, float]] = {
    "red": (0.90, 0.12, 0.12),
    "green": (0.12, 0.75, 0.20),
    "blue": (0.15, 0.30, 0.95),
    "yellow": (0.98, 0.88, 0.10),
    "purple": (0.60, 0.15, 0.80),
    "orange": (1.00, 0.50, 0.05),
    "white": (0.97, 0.97, 0.97),
    "cyan": (0.10, 0.85, 0.90),
}
MOTIONS = (
    "moving left to right",
    "moving right to left",
    "moving top to bottom",
    "moving bottom to top",
    "growing small to large",
    "shrinking large to small",
)
BACKGROUNDS: dict[str, tuple[float, float, float]] = {
    "black": (0.05, 0.05, 0.06),
    "gray": (0.50, 0.50, 0.50),
    "white": (0.95, 0.95, 0.95),
    "blue": (0.12, 0.22, 0.72),
    "brown": (0.40, 0.25, 0.12),
    "pink": (0.98, 0.68, 0.80),
}
PREPOSITIONS = ("over", "on")

# Below this distance in RGB an object is hardly visible on its background.
MIN_CONTRAST = 0.42
# One in this many combinations of shape, colour, motion and background is held out of training.
HELD_OUT_ONE_IN = 10

_OBJECT = re.compile(
    rf"an? (?P<colour>{'|'.join(COLOURS)}) (?P<shape>{'|'.join(SHAPES)}) "
    rf"(?P<motion>{'|'.join(MOTIONS)})"
)
_BACKGROUND = re.compile(
    rf"(?P<preposition>{'|'.join(PREPOSITIONS)}) an? (?P<background>{'|'.join(BACKGROUNDS)}) "
    r"background"
)


@dataclass(frozen=True, slots=True)
class SceneObject:
    """One object of a scene."""

    shape: str
    colour: str
    motion: str

    def __post_init__(self) -> None:
        _require_member("shape", self.shape, SHAPES)
        _require_member("colour", self.colour, tuple(COLOURS))
        _require_member("motion", self.motion, MOTIONS)


@dataclass(frozen=True, slots=True)
class Scene:
    """One or two objects over a background; the first of two is in the upper half."""

    objects: tuple[SceneObject, ...]
    background: str
    preposition: str = "over"

    def __post_init__(self) -> None:
        _require_member("background", self.background, tuple(BACKGROUNDS))
        _require_member("preposition", self.preposition, PREPOSITIONS)
        if len(self.objects) not in (1, 2):
            raise ValueError(
                f"a scene holds one or two objects, got {len(self.objects)}; "
                "make one scene for each pair of objects."
            )

    @property
    def prompt(self) -> str:
        """The prompt that describes the scene."""
        objects = " and ".join(
            f"a{'n' * (item.colour[0] in 'aeiou')} {item.colour} {item.shape} {item.motion}"
            for item in self.objects
        )
        return f"{objects} {self.preposition} a {self.background} background"

    @property
    def is_held_out(self) -> bool:
        """Whether every object is a held-out combination."""
        return all(is_held_out(item, self.background) for item in self.objects)

    @property
    def is_trainable(self) -> bool:
        """Whether no object is a held-out combination."""
        return not any(is_held_out(item, self.background) for item in self.objects)


def parse_prompt(prompt: str) -> Scene:
    """The scene that ``prompt`` describes.

    Raises:
        ValueError: The prompt is not in the grammar.
    """
    text = " ".join(prompt.lower().split())
    *first, last = text.split(" and ")
    objects = []
    for part in first:
        match = _OBJECT.fullmatch(part)
        if match is None:
            raise ValueError(_not_in_grammar(prompt))
        objects.append(SceneObject(**match.groupdict()))
    match = re.fullmatch(f"(?:{_OBJECT.pattern}) {_BACKGROUND.pattern}", last)
    if match is None:
        raise ValueError(_not_in_grammar(prompt))
    objects.append(SceneObject(match["shape"], match["colour"], match["motion"]))
    return Scene(tuple(objects), match["background"], match["preposition"])


def is_distinct(colour: str, background: str) -> bool:
    """Whether an object of ``colour`` stands out from ``background``."""
    distance: float = sum(
        (a - b) ** 2 for a, b in zip(COLOURS[colour], BACKGROUNDS[background], strict=True)
    )
    return colour != background and distance >= MIN_CONTRAST**2


def is_held_out(item: SceneObject, background: str) -> bool:
    """Whether the combination is held out of training; a fixed rule, equal on every machine."""
    key = f"{item.shape}|{item.colour}|{item.motion}|{background}"
    return zlib.crc32(key.encode()) % HELD_OUT_ONE_IN == 0


def combinations() -> list[tuple[SceneObject, str]]:
    """Every object with every background on which it stands out."""
    return [
        (SceneObject(shape, colour, motion), background)
        for shape, colour, motion, background in itertools.product(
            SHAPES, COLOURS, MOTIONS, BACKGROUNDS
        )
        if is_distinct(colour, background)
    ]


def sample_scene(rng: random.Random, num_objects: int, *, held_out: bool = False) -> Scene:
    """A random scene of the training part, or of the held-out part.

    Args:
        rng: Source of the choices.
        num_objects: One or two; two objects differ in colour.
        held_out: Whether every object is a held-out combination; else none is.
    """
    while True:
        background = rng.choice(tuple(BACKGROUNDS))
        colours = [name for name in COLOURS if is_distinct(name, background)]
        objects = tuple(
            SceneObject(rng.choice(SHAPES), colour, rng.choice(MOTIONS))
            for colour in rng.sample(colours, num_objects)
        )
        scene = Scene(objects, background, rng.choice(PREPOSITIONS))
        if scene.is_held_out if held_out else scene.is_trainable:
            return scene


def held_out_scenes(count: int, seed: int = 0) -> list[Scene]:
    """Distinct held-out scenes on which models are evaluated.

    Args:
        count: Number of scenes; every fourth has two objects.
        seed: Selects the scenes; a larger count begins with the scenes of a smaller one.

    Raises:
        ValueError: There are not so many scenes.
    """
    alone = len(PREPOSITIONS) * sum(is_held_out(*found) for found in combinations())
    # Scenes of one object are far fewer than those of two, so they limit the number.
    most = alone + alone // 3
    if count > most:
        raise ValueError(f"there are {most} held-out scenes, got count={count}; ask for fewer.")
    rng = random.Random(seed)
    scenes: list[Scene] = []
    while len(scenes) < count:
        num_objects = 2 if len(scenes) % 4 == 3 else 1
        scene = sample_scene(rng, num_objects, held_out=True)
        if scene not in scenes:
            scenes.append(scene)
    return scenes


def _require_member(what: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"unknown {what} {value!r}; use one of {', '.join(known)}.")


def _not_in_grammar(prompt: str) -> str:
    return (
        f"the prompt is not in the demo model's grammar, got {prompt!r}; expected for instance "
        "'a red circle moving left to right over a blue background'. "
        f"Shapes: {', '.join(SHAPES)}. Colours: {', '.join(COLOURS)}. "
        f"Motions: {', '.join(MOTIONS)}. Backgrounds: {', '.join(BACKGROUNDS)}."
    )
