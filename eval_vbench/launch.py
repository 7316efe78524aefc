"""The part of a run that this process generates, as set by accelerate launch or torchrun."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from xattn_video.pipelines.job_ranks import launched_count

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Share:
    """The share of one of several processes; by default the only one.

    Attributes:
        rank: Number of this process among those on all hosts.
        num_ranks: Number of processes on all hosts.
        local_rank: Number of this process on its host, and of its GPU.
    """

    rank: int = 0
    num_ranks: int = 1
    local_rank: int = 0

    def of(self, items: Sequence[T]) -> list[T]:
        """The items of this process."""
        return list(items[self.rank :: self.num_ranks])


def launched_share(gpus_per_video: int = 1) -> Share:
    """The share that the launcher set for this process, or for a group of neighbours.

    Args:
        gpus_per_video: Number of neighbours that generate each video of their share together.

    Raises:
        ValueError: The processes cannot be divided into such groups.
    """
    count = launched_count()
    if gpus_per_video < 1 or count % gpus_per_video:
        raise ValueError(
            f"gpus_per_video must divide the number of processes, got {gpus_per_video} with "
            f"{count}; start it with torchrun --nproc-per-node N -m -- eval_vbench.generate."
        )
    if count == 1:
        return Share()
    rank, local_rank = int(os.environ["RANK"]), int(os.environ.get("LOCAL_RANK", 0))
    return Share(rank // gpus_per_video, count // gpus_per_video, local_rank)
