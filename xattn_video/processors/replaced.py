"""Replaces a method on one object for a while."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn


@contextlib.contextmanager
def replaced(owner: nn.Module, name: str, function: Callable[..., Any]) -> Iterator[None]:
    """Replace a method of one object, and restore it unless it was replaced again meanwhile."""
    previous = vars(owner).get(name)
    setattr(owner, name, function)
    try:
        yield
    finally:
        if vars(owner).get(name) is function:
            delattr(owner, name)
            if previous is not None:
                setattr(owner, name, previous)
