"""Runs a function on several ranks of torch.distributed: gloo, on the CPU."""

import os
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


def run_ranks(function: Callable[[], Any], num_ranks: int, folder: Path) -> list[Any]:
    """What the function, of a module of tests, returns on each rank."""
    # One process imports for all ranks.
    torch.multiprocessing.set_forkserver_preload(["xattn_video.processors"])
    torch.multiprocessing.start_processes(
        _run_rank, (function, num_ranks, str(folder)), num_ranks, start_method="forkserver"
    )
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(num_ranks)]


def _run_rank(rank: int, function: Callable[[], Any], num_ranks: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(num_ranks), "LOCAL_RANK": str(rank)}
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=num_ranks,
        timeout=timedelta(seconds=60),
    )
    # Diffusers' own enable_parallelism counts GPUs.
    torch.accelerator.device_count = lambda: 1
    torch.save(function(), f"{folder}/{rank}.pt")
    dist.destroy_process_group()
