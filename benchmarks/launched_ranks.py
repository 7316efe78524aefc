"""The processes that torchrun launched for one benchmark, each with its own GPU."""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist

from xattn_video.pipelines.job_ranks import end_group


@dataclass(frozen=True, slots=True)
class LaunchedRanks:
    """This process among the launched ones.

    Args:
        rank: Number of this process, from 0.
        count: Number of processes; 1 without torchrun.
        device: The device of this process.
    """

    rank: int
    count: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        """Whether this process prints and writes for all."""
        return self.rank == 0

    def wait(self) -> None:
        """Wait until all processes have called this."""
        if self.count > 1:
            dist.barrier()


@contextlib.contextmanager
def launched_ranks(device: torch.device) -> Iterator[LaunchedRanks]:
    """Join the other processes, with NCCL on GPUs and gloo elsewhere."""
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1:
        yield LaunchedRanks(0, 1, device)
        return
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
        dist.init_process_group("nccl", device_id=device)
    else:
        dist.init_process_group("gloo")
    ranks = LaunchedRanks(dist.get_rank(), count, device)
    yield ranks
    # All ranks leave together, so that none ends while another still talks to it.
    ranks.wait()
    # Not after an exception: others may be waiting for this rank, and torchrun ends them.
    end_group()
