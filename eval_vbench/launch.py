"""The part of a run that this process generates, as set by accelerate launch or torchrun."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Share:
    """One of several processes; by default the only one.

    Attributes:
        rank: Number of this process over all hosts.
        num_ranks: Number of processes on all hosts.
        local_rank: Number of this process on its host, and of its GPU.
    """

    rank: int = 0
    num_ranks: int = 1
    local_rank: int = 0

    def of(self, items: Sequence[T]) -> list[T]:
        """The items of this process."""
        return list(items[self.rank :: self.num_ranks])


def launched_share() -> Share:
    """The share that the launcher set for this process.

    The processes exchange nothing but files, so no process group is opened that could time out
    while one of them works on a long video.
    """
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    rank, num_ranks, local_rank = (os.environ.get(name) for name in names)
    if rank is None or num_ranks is None:
        return Share()
    return Share(int(rank), int(num_ranks), int(local_rank or 0))
