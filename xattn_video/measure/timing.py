"""Measures the time and memory of a call."""

import signal
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

import torch


@dataclass(frozen=True, slots=True)
class Budget:
    """How often a call is timed: ``repeats`` times, or fewer to stay within ``max_seconds``.

    On a GPU the number is approximate.
    """

    repeats: int = 10
    max_seconds: float = 20.0

    def __post_init__(self) -> None:
        if not self.max_seconds > 0:
            raise ValueError(
                f"the seconds for a row must be above 0, got {self.max_seconds}; use 5."
            )

    def repeats_of(self, seconds: float) -> int:
        """The number of repeats for a call that takes ``seconds``; at least one."""
        return max(1, min(self.repeats, int(self.max_seconds / max(seconds, 1e-9))))


def wait_for(device: torch.device) -> None:
    """Wait until a GPU has finished its work; does nothing on a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure(
    run: Callable[[], object], device: torch.device, budget: Budget
) -> dict[str, float | int | None]:
    """Median latency of a call in ms after a warm-up call, and its CUDA memory in GiB."""
    if device.type != "cuda":
        times = [_clocked(run)]
        times = [_clocked(run) for _ in range(budget.repeats_of(times[0]))]
        return {
            "latency_ms": statistics.median(times) * 1e3,
            "repeats": len(times),
            "peak_memory_gib": None,
            "extra_memory_gib": None,
        }
    from triton.testing import do_bench

    def finish() -> None:
        run()
        torch.cuda.synchronize(device)

    with torch.cuda.device(device):
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.synchronize(device)
        seconds = _clocked(finish)
        peak = torch.cuda.max_memory_allocated(device)
        budgeted = min(budget.repeats * seconds, budget.max_seconds)
        # Timed with CUDA events, and a cold L2 cache for every call.
        times = do_bench(run, warmup=0, rep=1e3 * budgeted, return_mode="all")
    return {
        "latency_ms": statistics.median(times),
        "repeats": len(times),
        "peak_memory_gib": peak / 2**30,
        "extra_memory_gib": (peak - before) / 2**30,
    }


def _clocked(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise TimeoutError after ``seconds``, between two instructions of Python.

    Without timers in the system, or outside the main thread, there is no limit.
    """
    is_main = threading.current_thread() is threading.main_thread()
    if not hasattr(signal, "setitimer") or not is_main:
        yield
        return

    def stop(signum: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"stopped after {seconds:g} seconds; raise the limit to wait longer.")

    previous = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
