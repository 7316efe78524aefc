"""The processes that torchrun has launched for one benchmark, each with a GPU of its own."""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist


@dataclass(frozen=True, slots=True)
class LaunchedRanks:
    """This process among them.

    Args:
        rank: From 0.
        count: Of all; 1 without torchrun.
        device: This process's own.
    """

    rank: int
    count: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        """Whether this process prints and writes for all."""
        return self.rank == 0

    def wait(self) -> None:
        """Until all are here."""
        if self.count > 1:
            dist.barrier()


@contextlib.contextmanager
def launched_ranks(device: torch.device) -> Iterator[LaunchedRanks]:
    """Join the others: NCCL on GPUs, gloo elsewhere."""
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
    yield LaunchedRanks(dist.get_rank(), count, device)
    # Not after an exception: the others may be waiting for this rank, and torchrun ends them.
    dist.destroy_process_group()
