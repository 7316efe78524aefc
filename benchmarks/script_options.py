"""Command-line options that the benchmarks share."""

import argparse
from collections.abc import Callable
from typing import TypeVar

import torch

from xattn_video.files import user_path

T = TypeVar("T")
HERE = "cuda" if torch.cuda.is_available() else "cpu"
"""The default device of benchmarks that also run on a CPU."""


def measuring_parser(about: str | None, device: str = HERE) -> argparse.ArgumentParser:
    """A parser with the options --device, --commit and --output.

    Args:
        about: The docstring of the script.
        device: The default of --device.
    """
    parser = argparse.ArgumentParser(
        description=about, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default=device)
    commit = "commit of this repository, if git is not available"
    parser.add_argument("--commit", help=commit)
    parser.add_argument("--output", type=user_path, help="JSON file to write")
    return parser


def comma_separated(kind: Callable[[str], T]) -> Callable[[str], list[T]]:
    """A function that parses "a,b" into a list."""

    def parse(text: str) -> list[T]:
        return [kind(word.strip()) for word in text.split(",") if word.strip()]

    return parse
