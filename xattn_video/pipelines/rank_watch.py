"""Watches the ranks of a job from a thread in each, so that none waits for one that has ended.

Every rank writes to a common store that it is alive, and its progress. The first failure is kept
there; it ends all ranks, with one line that names the rank that failed.
"""

import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

FAILED = 1
_BEAT_SECONDS = 0.5
# A rank that is silent for so long counts as ended, without any other sign of it.
PATIENCE_SECONDS = 45.0
# The same after a broken connection or a signal of the launcher, which mean that a rank ended.
SUSPICION_SECONDS = 4.0
# Time for the main thread to notice the failure by itself, while it waits for a rank or works.
_WAITING_GRACE, _WORKING_GRACE = 2.0, 25.0
_TOLD_SECONDS = 10.0
# A rank stands still after this many times the longest time between two layers.
_SLOWNESS = 4
_ENDED = "it ended without a message; it was killed or ran out of host memory"


@dataclass(frozen=True, slots=True)
class RankFailure:
    """The first failure of a job.

    Attributes:
        rank: The rank that failed; None if all ranks were interrupted.
        text: What happened, in one line.
        shared: Whether it failed in work that the ranks share.
    """

    rank: int | None
    text: str
    shared: bool = True

    def __str__(self) -> str:
        if self.rank is None:
            return self.text
        # Work that only the first rank does needs no rank number.
        return (
            self.text if self.rank == 0 and not self.shared else f"rank {self.rank}: {self.text}"
        )


class RankLostError(RuntimeError):
    """Another rank failed; the watch knows why."""


class RankWatch:
    """Tells the other ranks that this one is alive, and finds out which ranks are not.

    Args:
        store: The store of the job, a `torch.distributed.Store`.
        rank, count: Number of this rank, and number of ranks.
        tell: Function that prints an error.

    Attributes:
        failure: The first failure, once it is known.
        is_computing: Whether the ranks are waiting for one another.
        team: The ranks that then wait for one another.
    """

    def __init__(self, store: Any, rank: int, count: int, tell: Callable[[str], None]) -> None:
        self.failure: RankFailure | None = None
        self.is_computing = False
        self.team = range(count)
        self._store, self._rank = store, rank
        # A separate client, because a waiting call blocks others on the same client.
        self._thread_store = store.clone()
        self._tell = tell
        self._others = [other for other in range(count) if other != rank]
        now = time.monotonic()
        # Last message of each rank, and when it changed; then its progress, and when that changed.
        self._heard: dict[int, tuple[str, float]] = {}
        self._reached = dict.fromkeys(range(count), (0, now))
        self._progress, self._slowest, self._ticked = 0, 0.0, now
        self._beats = 0
        self._is_terminated = False
        self._has_left = False
        self._found_at: float | None = None
        self._claim = threading.Lock()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="rank watch", daemon=True)

    def start(self) -> None:
        """Start watching."""
        process = [socket.gethostname(), os.getpid()]
        self._store.set(f"process/{self._rank}", json.dumps(process))
        # A main thread that waits for its GPU handles no signals; this informs the watch thread.
        self._signals, self._wakeup = socket.socketpair()
        self._signals.setblocking(False)
        self._wakeup.setblocking(False)
        signal.set_wakeup_fd(self._wakeup.fileno(), warn_on_full_buffer=False)
        self._thread.start()

    def stop(self) -> None:
        """Stop watching, after all ranks are done."""
        self._stopped.set()
        self._thread.join()
        signal.set_wakeup_fd(-1)
        self._signals.close()
        self._wakeup.close()

    def tick(self, *_: object) -> None:
        """Record progress of the main thread; also used as a forward pre-hook."""
        now = time.monotonic()
        if self._progress:
            self._slowest = max(self._slowest, now - self._ticked)
        self._progress, self._ticked = self._progress + 1, now

    def check(self) -> None:
        """Raise RankLostError if a rank has failed."""
        if self.failure is not None:
            raise RankLostError(str(self.failure))

    def publish(self, text: str, rank: int | None = None) -> RankFailure:
        """Publish that this rank, or another, failed; returns the first failure of the job."""
        rank = self._rank if rank is None else rank
        return self._publish(self._store, RankFailure(rank, text, self.is_computing))

    def publish_unless_left(self, text: str) -> None:
        """Publish that this rank failed, unless a failure is known or this rank has left."""
        if self.failure is None and not self._has_left:
            self.publish(text)

    def leave(self, why: str) -> None:
        """Publish that this rank ends without having failed itself."""
        self._has_left = True
        self._store.set(f"left/{self._rank}", why)

    def say_told(self) -> None:
        """Publish that the error has been printed."""
        self._store.set("told", "1")
        self._end_stopped_process(self._store)

    def wait_until_told(self, seconds: float = _TOLD_SECONDS) -> None:
        """Wait until the error is printed: a launcher ends all ranks when one has ended."""
        self._tell_once(self._store)
        ends = time.monotonic() + seconds
        while time.monotonic() < ends and not self._store.check(["told"]):
            time.sleep(0.05)

    def suspect(self, seconds: float, *, heed_left: bool) -> RankFailure | None:
        """Wait for the failure of another rank; None if all ranks are alive.

        Args:
            seconds: How long to wait at most.
            heed_left: Whether a rank that was interrupted counts as failed.
        """
        ends = time.monotonic() + seconds
        while self.failure is None and time.monotonic() < ends:
            now = time.monotonic()
            for other in self._others:
                said, since = self._heard.get(other, ("", now))
                if said.startswith("left"):
                    if heed_left:
                        return self._publish(self._store, self._leaving(other, said))
                elif now - since > SUSPICION_SECONDS:
                    return self.publish(_ENDED, other)
            time.sleep(0.1)
        return self.failure

    def claim(self) -> None:
        """Let only this thread end the process; never returns if the watch is doing so."""
        if not self._claim.acquire(blocking=False):
            threading.Event().wait()

    def _tell_once(self, store: Any) -> None:
        """Print the failure if this is the first rank, or the second if the first one failed."""
        if self.failure is None or self._rank != (1 if self.failure.rank == 0 else 0):
            return
        with suppress(RuntimeError):
            if not store.check(["told"]):
                self._tell(str(self.failure))
                store.set("told", "1")
        self._end_stopped_process(store)

    def _end_stopped_process(self, store: Any) -> None:
        """Kill the failed rank if it is stopped, because a launcher waits 30 s for it to end.

        It must run on this machine under the same launcher.
        """
        with suppress(RuntimeError, OSError):
            if self.failure is None or not store.check([key := f"process/{self.failure.rank}"]):
                return
            host, pid = json.loads(store.get(key))
            status = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8")
            state, parent = status.rpartition(")")[2].split()[:2]
            if (host, parent, state) == (socket.gethostname(), str(os.getppid()), "T"):
                os.kill(pid, signal.SIGKILL)

    def _leaving(self, other: int, said: str) -> RankFailure:
        """The failure of an interrupted rank; names no rank if this one was interrupted too."""
        if self._is_terminated:
            return RankFailure(None, "all ranks were interrupted by SIGTERM")
        return RankFailure(other, said.removeprefix("left "), self.is_computing)

    def _publish(self, store: Any, failure: RankFailure) -> RankFailure:
        first = store.compare_set("failure", "", json.dumps(asdict(failure)))
        self.failure = RankFailure(**json.loads(first))
        return self.failure

    def _run(self) -> None:
        while not self._stopped.wait(_BEAT_SECONDS):
            try:
                self._beat()
                self._note_signals()
                self._judge()
            except RuntimeError:
                # The store is gone. It lives as long as the launcher or, without one, as rank 0.
                self.failure = self.failure or RankFailure(0, "it ended without a message")
            if self.failure is not None:
                self._end_stuck_process()

    def _beat(self) -> None:
        """Publish that this rank is alive, and read what the others published."""
        store, now = self._thread_store, time.monotonic()
        self._beats += 1
        store.set(f"beat/{self._rank}", f"{self._beats} {self._progress}")
        self._note_progress(self._rank, self._progress, now)
        for other in self._others:
            # `check` first, because `get` waits for the key while it holds the client's lock.
            if store.check([f"left/{other}"]):
                said = f"left {store.get(f'left/{other}').decode()}"
            elif store.check([f"beat/{other}"]):
                said = store.get(f"beat/{other}").decode()
                self._note_progress(other, int(said.split()[1]), now)
            else:
                continue
            if self._heard.get(other, ("", 0.0))[0] != said:
                self._heard[other] = (said, now)
        if store.check(["failure"]):
            self.failure = RankFailure(**json.loads(store.get("failure")))

    def _note_progress(self, rank: int, progress: int, now: float) -> None:
        if self._reached[rank][0] != progress:
            self._reached[rank] = (progress, now)

    def _note_signals(self) -> None:
        """Record a SIGTERM, which the launcher sends when another rank has ended."""
        with suppress(BlockingIOError):
            if signal.SIGTERM in self._signals.recv(4096):
                self._is_terminated = True

    def _judge(self) -> None:
        """Publish the failure of a rank that is silent, was interrupted or makes no progress."""
        now = time.monotonic()
        for other, (said, since) in self._heard.items():
            if said.startswith("left"):
                self._publish(self._thread_store, self._leaving(other, said))
            elif self._is_terminated and now - since > SUSPICION_SECONDS:
                self._publish(self._thread_store, RankFailure(other, _ENDED))
            elif now - since > PATIENCE_SECONDS:
                text = f"it has not answered for {PATIENCE_SECONDS:.0f} s"
                self._publish(self._thread_store, RankFailure(other, text))
        patience = max(PATIENCE_SECONDS, _SLOWNESS * self._slowest)
        if not self.is_computing or any(
            now - max(self._reached[rank][1], self._ticked) < patience for rank in self.team
        ):
            return
        least = min(self.team, key=lambda rank: self._reached[rank][0])
        if self._reached[least][0] < self._progress:
            text = f"it has made no progress for {patience:.0f} s while the others wait for it"
            self._publish(self._thread_store, RankFailure(least, text))

    def _end_stuck_process(self) -> None:
        """End the process if its main thread does not: it waits for a rank that is gone."""
        self._found_at = self._found_at or time.monotonic()
        grace = _WAITING_GRACE if self.is_computing else _WORKING_GRACE
        if time.monotonic() - self._found_at < grace or not self._claim.acquire(blocking=False):
            return
        self._tell_once(self._thread_store)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(FAILED)
