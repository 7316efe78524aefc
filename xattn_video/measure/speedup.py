"""Predicts the speed-up on this machine from one attention problem."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from xattn_video.backends.table import resolve_backend
from xattn_video.measure.attention_cases import (
    Columns,
    SparseGrid,
    dense_cases,
    measure_cases,
    sparse_cases,
)
from xattn_video.measure.attention_problems import BLOCK_SIZE, AttentionProblem, clustered_tensors
from xattn_video.measure.dense_baselines import STOCK, best_dense
from xattn_video.measure.timing import Budget
from xattn_video.ops.problem import Problem
from xattn_video.policy.settings import SparseSettings


@dataclass(frozen=True, slots=True)
class Speedup:
    """Measured rows, and the speed-ups that follow from them.

    Attributes:
        rows: Dense kernels, scoring, selection, attention and all of XAttention.
        failures: Rows that could not be measured.
    """

    rows: tuple[Columns, ...]
    failures: tuple[Columns, ...]

    @property
    def best_dense(self) -> Columns | None:
        """The fastest dense kernel that uses no mask."""
        return best_dense(self.rows)

    @property
    def stock(self) -> Columns | None:
        """The stock processor's kernel."""
        return next((row for row in self.rows if row["backend"] == STOCK), None)

    @property
    def whole(self) -> Columns | None:
        """XAttention: scoring, selection and attention."""
        return next((row for row in self.rows if row["name"] == "xattention"), None)

    def of_attention(self, dense: Columns | None) -> float | None:
        """Latency of a dense row over that of XAttention; None if either was not measured."""
        if dense is None or self.whole is None:
            return None
        return float(dense["latency_ms"]) / float(self.whole["latency_ms"])

    def of_step(self, attention_share: float) -> float | None:
        """Speed-up of a step in which dense attention takes the share ``attention_share``."""
        attention = self.of_attention(self.best_dense)
        if attention is None:
            return None
        return 1 / (1 - attention_share + attention_share / attention)


def measure_speedup(
    problem: AttentionProblem,
    device: torch.device,
    dtype: torch.dtype,
    settings: SparseSettings,
    budget: Budget,
    on_row: Callable[[Columns], None],
) -> Speedup:
    """Measure on random tensors, at the settings' density, stride and backend.

    ``on_row`` is called for every row, measured or failed.

    Raises:
        BackendUnavailableError: The backend cannot run the problem, with every reason.
    """
    assert isinstance(settings.density, int | float)
    problem_here = Problem(device, dtype, problem.head_dim, BLOCK_SIZE)
    tensors = clustered_tensors(problem, device, dtype)
    grid = SparseGrid(
        densities=(settings.density,),
        strides=(settings.stride,),
        backends=(resolve_backend(settings.backend, problem_here),),
        precisions=("auto",),
    )
    rows: list[Columns] = []
    failures: list[Columns] = []
    for cases in (dense_cases(tensors), sparse_cases(tensors, grid)):
        for row, done in measure_cases(cases, device, budget):
            (rows if done else failures).append(row)
            on_row(row)
    return Speedup(tuple(rows), tuple(failures))
