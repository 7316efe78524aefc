"""Which part of a run this process does, as accelerate launch or torchrun told it."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Share:
    """One process of several; alone by default.

    Attributes:
        rank: This process, counted over all hosts.
        num_ranks: Processes on all hosts.
        local_rank: This process on its host, which is its GPU.
    """

    rank: int = 0
    num_ranks: int = 1
    local_rank: int = 0

    def of(self, items: Sequence[T]) -> list[T]:
        """The items that fall to this process."""
        return list(items[self.rank :: self.num_ranks])


def launched_share() -> Share:
    """What the launcher set for this process.

    The processes exchange nothing but files, so no process group is opened that could time out
    while one of them works on a long video.
    """
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    rank, num_ranks, local_rank = (os.environ.get(name) for name in names)
    if rank is None or num_ranks is None:
        return Share()
    return Share(int(rank), int(num_ranks), int(local_rank or 0))
