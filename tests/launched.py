"""Runs the command line on several ranks, as a launcher does: gloo, on the CPU."""

import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.distributed import TCPStore

ROOT = Path(__file__).parents[1]
LAUNCHERS = {
    "torchrun": ["torch.distributed.run", "--nproc-per-node=2"],
    "accelerate": [
        "accelerate.commands.launch",
        *("--multi_gpu", "--num_processes=2", "--num_machines=1"),
        *("--mixed_precision=no", "--dynamo_backend=no"),
    ],
}
_GRACE_SECONDS = 12
Sabotage = Callable[[int], None]


@dataclass(frozen=True)
class Ended:
    """What a rank left: its exit code, None if it was ended, and what it printed."""

    code: int | None
    out: str
    err: str


def xattn_video() -> None:
    from xattn_video.cli import main

    main()


def launch(
    words: Sequence[object] | dict[int, Sequence[object]],
    num_ranks: int,
    folder: Path,
    sabotage: Sabotage | None = None,
    seconds: float = 60,
    entry: Callable[[], None] = xattn_video,
) -> list[Ended]:
    """Run `xattn-video` with these words on every rank within ``folder``.

    Args:
        words: Of all ranks, or {rank: words}.
        num_ranks: How many.
        folder: Where they run.
        sabotage: Called first in every rank's process; a function of a module of tests.
        seconds: Within which all of them must end.
        entry: Another command's entry point.
    """
    # One process imports for all ranks.
    torch.multiprocessing.set_forkserver_preload(["xattn_video.processors", "xattn_video.cli"])
    context = torch.multiprocessing.get_context("forkserver")
    # As torchrun does: the store outlives every rank.
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    logs = folder / "logs"
    logs.mkdir(exist_ok=True)
    processes = []
    for rank in range(num_ranks):
        own = words[rank] if isinstance(words, dict) else words
        arguments = (
            rank,
            num_ranks,
            store.port,
            [str(word) for word in own],
            folder,
            sabotage,
            entry,
        )
        processes.append(context.Process(target=_run, args=arguments))
        processes[-1].start()
    ends = time.monotonic() + seconds
    while time.monotonic() < ends and any(process.is_alive() for process in processes):
        time.sleep(0.05)
        if any(process.exitcode for process in processes):
            ends = min(ends, time.monotonic() + _GRACE_SECONDS)
    codes = [process.exitcode for process in processes]
    for process in processes:
        # A launcher does so with those that outlive the first that failed.
        process.kill()
        process.join()
    assert any(codes) or None not in codes, [log.read_text() for log in logs.iterdir()]
    return [
        Ended(code, (logs / f"{rank}.out").read_text(), (logs / f"{rank}.err").read_text())
        for rank, code in enumerate(codes)
    ]


def _run(
    rank: int,
    num_ranks: int,
    port: int,
    words: list[str],
    folder: Path,
    sabotage: Sabotage | None,
    entry: Callable[[], None],
) -> None:
    torch.set_num_threads(1)
    os.chdir(folder)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(num_ranks), "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= {"LOCAL_WORLD_SIZE": str(num_ranks), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    for number, name in ((1, "out"), (2, "err")):
        file = os.open(folder / f"logs/{rank}.{name}", os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
        os.dup2(file, number)
    sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
    sys.argv = ["xattn-video", *words]
    if sabotage is not None:
        sabotage(rank)
    try:
        entry()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
