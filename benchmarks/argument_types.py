"""Types of command-line arguments, shared by the benchmarks."""

from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def comma_separated(kind: Callable[[str], T]) -> Callable[[str], list[T]]:
    """A function that parses "a,b" into a list."""

    def parse(text: str) -> list[T]:
        return [kind(word.strip()) for word in text.split(",") if word.strip()]

    return parse
