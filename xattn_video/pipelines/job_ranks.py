"""The ranks of one job: processes that torchrun or accelerate launch started together."""

import contextlib
import copy
import gc
import io
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TextIO, TypeVar

from xattn_video.pipelines.item_folder import describe_differences
from xattn_video.pipelines.rank_watch import RankLostError, RankWatch

if TYPE_CHECKING:
    import torch

    from xattn_video.pipelines.loading import LoadOptions

T = TypeVar("T")

_JOIN_MINUTES = 5
# A generous limit: the watch ends a stuck job long before.
_GROUP_MINUTES = 30
_VERDICT_SECONDS = 15.0
_TERMINATED_SECONDS = 6.0
_LOST = re.compile(r"gloo|nccl|connection (closed|reset|refused)|broken pipe", re.IGNORECASE)


class JobRanks:
    """This process among the ranks of its job; by default it is the only one.

    Attributes:
        rank, count: Number of this rank, from 0, and number of ranks.
        local_rank, local_count: The same on this machine.
        watch: The watch over the other ranks; None for a single process.
        team_size: Number of ranks that share a video; all ranks unless `team` was called.
    """

    def __init__(
        self,
        rank: int = 0,
        count: int = 1,
        local_rank: int = 0,
        local_count: int = 1,
        store: Any = None,
        tell: Callable[[str], None] = print,
    ) -> None:
        self.rank, self.count = rank, count
        self.local_rank, self.local_count = local_rank, local_count
        self.watch = None if store is None else RankWatch(store, rank, count, tell)
        self._store = store
        self._meetings = 0
        self.team_size = count
        self._team = 0

    @property
    def is_first(self) -> bool:
        """Whether this rank prints and writes for all."""
        return self.rank == 0

    @property
    def is_first_of_team(self) -> bool:
        """Whether this rank writes the videos of its team."""
        return self.rank % self.team_size == 0

    @property
    def is_alone(self) -> bool:
        """Whether this is the only rank."""
        return self.count == 1

    def team(self, size: int) -> "JobRanks":
        """This rank within a team of ``size`` neighbours that share videos and meet."""
        team = copy.copy(self)
        team._team, team.team_size, team._meetings = self.rank // size + 1, size, 0
        if team.watch is not None:
            first = self.rank // size * size
            team.watch.team = range(first, first + size)
        return team

    def meet(self) -> None:
        """Wait for all ranks of the team, however long they take.

        Raises:
            RankLostError: A rank failed.
        """
        if self.watch is None:
            return
        self._meetings += 1
        key = f"meeting/{self._team}/{self._meetings}"
        self._store.add(key, 1)
        while self._store.add(key, 0) < self.team_size:
            self.watch.check()
            time.sleep(0.02)

    @contextlib.contextmanager
    def first_ahead(self) -> Iterator[None]:
        """A context that the first rank leaves before the others enter it."""
        if not self.is_first:
            self.meet()
        yield
        # Not in a finally: after an exception the process ends.
        if self.is_first:
            self.meet()

    def share(self, what: str, value: Callable[[], Any]) -> Any:
        """Give all ranks the first rank's value, which must be JSON; once for each ``what``."""
        import json

        if self.is_first:
            given = value()
            if self._store is not None:
                self._store.set(f"shared/{what}", json.dumps(given))
            self.meet()
            return given
        self.meet()
        return json.loads(self._store.get(f"shared/{what}"))

    def agree(self, what: str, values: dict[str, Any]) -> None:
        """Check that all ranks were given the same values.

        Raises:
            ValueError: This rank's values differ from the first rank's.
        """
        import json

        if self.is_alone:
            return
        own = json.loads(json.dumps(values, default=str))
        different = describe_differences(self.share(what, lambda: own), own)
        if different:
            raise ValueError(
                f"its {what} differ from those of rank 0: {'; '.join(different)} (rank 0 and this "
                "rank); give all ranks the same."
            )

    def deal(self, items: Sequence[T]) -> Iterator[T]:
        """Distribute items: each rank gets the next one as soon as it asks."""
        if self.is_alone:
            yield from items
            return
        while (number := self._store.add("dealt", 1) - 1) < len(items):
            yield items[number]

    def place(self, load: "LoadOptions") -> "LoadOptions":
        """The options with a separate device for this rank.

        Raises:
            ValueError: There are more ranks than GPUs, one GPU was named for all ranks, or torch
                lacks NCCL.
        """
        import torch
        import torch.distributed as dist

        device = load.resolved_device
        if self.is_alone:
            return load
        load = replace(load, processes=self.local_count)
        if device.type == "cpu":
            return load
        num_gpus = torch.cuda.device_count()
        if device.index is not None:
            raise ValueError(
                f"every rank needs a GPU of its own, got device {str(device)!r} for all "
                f"{self.count} ranks; use cuda."
            )
        if self.local_count > num_gpus:
            raise ValueError(
                f"every rank needs a GPU of its own, got {self.local_count} ranks and {num_gpus} "
                f"GPU(s) on this machine; start it with --nproc-per-node {num_gpus}."
            )
        if not dist.is_nccl_available():
            raise ValueError(
                "GPUs communicate through NCCL, which this torch does not have; use a CUDA build "
                "of torch for Linux, or one process without a launcher."
            )
        torch.cuda.set_device(self.local_rank)
        return replace(load, device=f"cuda:{self.local_rank}")

    def connect(self, device: "torch.device") -> None:
        """Open the process group: NCCL on GPUs, gloo elsewhere."""
        import torch.distributed as dist
        from torch._C._distributed_c10d import PrefixStore

        if self.is_alone:
            return
        self.meet()
        on_gpu = device.type == "cuda"
        dist.init_process_group(
            "nccl" if on_gpu else "gloo",
            store=PrefixStore("group", self._store.clone()),
            rank=self.rank,
            world_size=self.count,
            timeout=timedelta(minutes=_GROUP_MINUTES),
            device_id=device if on_gpu else None,
        )

    @contextlib.contextmanager
    def computing(self, pipe: Any) -> Iterator[None]:
        """A context in which ranks wait for one another in every layer; a stuck rank ends all."""
        if self.watch is None:
            yield
            return
        from diffusers.models.attention_processor import Attention

        layers = [layer for layer in pipe.transformer.modules() if isinstance(layer, Attention)]
        self.meet()
        handles = [
            module.register_forward_pre_hook(self.watch.tick)
            for module in (*layers, pipe.vae.decoder)
        ]
        self.watch.tick()
        self.watch.is_computing = True
        yield
        # Not in a finally: after an exception the process ends.
        self.watch.is_computing = False
        for handle in handles:
            handle.remove()

    def first_failure(self, error: BaseException, text: str) -> str:
        """The text to print for an error of this rank: the first failure of any rank.

        Args:
            error: The error that ends this process.
            text: Its description; "" for an interruption.
        """
        watch = self.watch
        if watch is None:
            return text
        watch.claim()
        if self.rank:
            # Only one rank prints the failure.
            _set_silent(True)
        is_lost = isinstance(error, RankLostError) or _is_of_exchange(error)
        if not isinstance(error, Exception):
            terminated = type(error) is not KeyboardInterrupt
            failure = (
                watch.suspect(_TERMINATED_SECONDS, heed_left=False)
                if terminated
                else watch.failure
            )
            if self.rank:
                watch.wait_until_told()
            watch.leave(f"it was interrupted{' by a signal' if terminated else ''}")
            return "" if failure is None else str(failure)
        failure = watch.suspect(_VERDICT_SECONDS, heed_left=True) if is_lost else None
        return str(failure or watch.publish(text))


def launched_count() -> int:
    """Number of processes that a launcher such as torchrun started; 1 without one."""
    launched = [os.environ.get(name, "") for name in ("RANK", "WORLD_SIZE")]
    return int(launched[1]) if all(value.isdecimal() for value in launched) else 1


@contextlib.contextmanager
def joined_ranks(tell: Callable[[str], None]) -> Iterator[JobRanks]:
    """Join the other ranks if a launcher started several; only the first may print.

    Args:
        tell: Function that prints an error.

    Raises:
        SystemExit: From the block inside, after all ranks know of it; or the ranks cannot connect.
    """
    count = launched_count()
    if count == 1:
        yield JobRanks()
        return
    import torch.distributed as dist
    from torch._C._distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    rank = int(os.environ["RANK"])
    try:
        store, _, _ = next(rendezvous("env://", timeout=timedelta(minutes=_JOIN_MINUTES)))
    except (RuntimeError, ValueError) as error:
        if rank == 0:
            tell(f"the {count} ranks could not connect: {' '.join(str(error).split())}")
        sys.exit(2)
    local_rank = int(os.environ.get("LOCAL_RANK", rank))
    local_count = int(os.environ.get("LOCAL_WORLD_SIZE", count))
    stderr = sys.stderr

    def tell_aloud(text: str) -> None:
        with contextlib.redirect_stderr(stderr):
            tell(text)

    ranks = JobRanks(rank, count, local_rank, local_count, PrefixStore("ranks", store), tell_aloud)
    assert ranks.watch is not None
    ranks.watch.start()
    with _quiet(rank) as last_line:
        try:
            yield ranks
        except SystemExit as ended:
            code = ended.code if isinstance(ended.code, int) else 1
            if code:
                _end_failed(ranks.watch, rank, code, last_line())
            ranks.meet()
            ranks.watch.stop()
            if dist.is_initialized():
                end_group()
            raise


def end_group() -> None:
    """End the process group and its threads; Python aborts if it ends while gloo's still run."""
    import torch.distributed as dist

    dist.destroy_process_group()
    # Cycles of modules and their hooks keep its subgroups.
    gc.collect()


def _end_failed(watch: RankWatch, rank: int, code: int, last_line: str) -> None:
    """End at once, because an orderly end would wait for unfinished NCCL operations."""
    with contextlib.suppress(RuntimeError):
        watch.publish_unless_left(last_line.removeprefix("error: "))
        if rank == 0:
            watch.say_told()
        else:
            watch.wait_until_told()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


class RankStream(io.TextIOBase):
    """The stdout or stderr of a rank that is not the first: silent, or with the rank's number.

    Args:
        stream: The stream to write lines to.
        rank: The number at the start of each line.

    Attributes:
        is_silent: Whether lines are dropped.
        last_line: The last line, kept even if it is dropped.
    """

    encoding = "utf-8"

    def __init__(self, stream: TextIO, rank: int) -> None:
        self.is_silent = True
        self.last_line = ""
        self._stream, self._rank, self._begun = stream, rank, ""

    def write(self, text: str) -> int:
        *lines, self._begun = (self._begun + text).split("\n")
        for line in lines:
            self.last_line = line
            if not self.is_silent:
                self._stream.write(f"[{self._rank}] {line}\n")
        return len(text)

    def flush(self) -> None:
        self._stream.flush()


@contextlib.contextmanager
def _quiet(rank: int) -> Iterator[Callable[[], str]]:
    """Silence all ranks but the first; yields the last line on stderr."""
    if rank == 0:
        yield lambda: "it failed"
        return
    errors = RankStream(sys.stderr, rank)
    output = RankStream(sys.stdout, rank)
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
        yield lambda: errors.last_line or "it failed"


def speak() -> None:
    """Let this rank print; each line begins with its number."""
    _set_silent(False)


def _set_silent(is_silent: bool) -> None:
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, RankStream):
            stream.is_silent = is_silent


def _is_of_exchange(error: BaseException) -> bool:
    """Whether the error says that another rank is gone."""
    import torch.distributed as dist

    is_runtime = isinstance(error, RuntimeError)
    return isinstance(error, dist.DistError) or (is_runtime and bool(_LOST.search(str(error))))
