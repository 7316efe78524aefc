"""Runs a function on several ranks of torch.distributed: gloo, on the CPU."""

import os
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import diffusers.hooks.context_parallel as diffusers_split
import torch
import torch.distributed as dist
from torch import Tensor


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
    # What Diffusers expects of GPUs and NCCL, and a CPU and gloo lack.
    torch.accelerator.device_count = lambda: 1
    diffusers_split._all_gather_anything = _gather_unequal
    torch.save(function(), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def _gather_unequal(tensor: Tensor, dim: int, group: Any) -> Tensor:
    """Gloo gathers equal sizes alone: pad to the largest and cut."""
    sizes = diffusers_split.gather_size_by_comm(tensor.shape[dim], group)
    shape = list(tensor.shape)
    shape[dim] = max(sizes)
    padded = tensor.new_zeros(shape)
    padded.narrow(dim, 0, tensor.shape[dim]).copy_(tensor)
    parts = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(parts, padded, group=group)
    return torch.cat([p.narrow(dim, 0, s) for p, s in zip(parts, sizes, strict=True)], dim)
