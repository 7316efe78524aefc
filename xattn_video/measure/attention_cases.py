"""The rows of a benchmark: what each one runs, how it is checked, and its result."""

import gc
import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from xattn_video.measure.attention_problems import (
    BLOCK_SIZE,
    AttentionTensors,
    density_of,
    threshold_for_density,
)
from xattn_video.measure.dense_baselines import dense_kernels
from xattn_video.measure.operator_checks import check_attention, check_scores, check_selection
from xattn_video.measure.selection_quality import selection_quality
from xattn_video.measure.timing import Budget, measure, time_limit
from xattn_video.ops.attention import compute_attention, xattention
from xattn_video.ops.blocks import BlockLists, ForcedBlocks, select_block_lists
from xattn_video.ops.problem import AttentionInputs
from xattn_video.ops.scoring import Precision, block_scores

Part = Literal["dense", "scoring", "selection", "attention", "xattention"]
Columns = dict[str, Any]

# Additional time limit of a row, because compiling can take longer than timing.
_SECONDS_TO_COMPILE = 60.0


@dataclass(frozen=True, slots=True)
class Case:
    """One row to measure.

    Attributes:
        row: The columns that are known before it runs.
        run: The function to time.
        check: Compares the function's result with the formula; returns the error or raises.
        flops: FLOP of the matrix products; None if the row shows no TFLOP/s.
        more: Function that computes further columns after the row was timed.
    """

    row: Columns
    run: Callable[[], Any]
    check: Callable[[Any], float]
    flops: float | None = None
    more: Callable[[], Columns] | None = None


@dataclass(frozen=True, slots=True)
class SparseGrid:
    """The sparse rows to measure: every combination of the listed values.

    A density stands for the threshold that gives it on the given tensors. `attention` rows exist
    only for the first stride and precision.
    """

    densities: tuple[float, ...] = ()
    thresholds: tuple[float, ...] = ()
    strides: tuple[int, ...] = (8,)
    backends: tuple[str, ...] = ("auto",)
    precisions: tuple[Precision, ...] = ("exact",)


def dense_cases(tensors: AttentionTensors) -> Iterator[Case]:
    """A case for each installed dense kernel."""
    for name, run, num_keys in dense_kernels(tensors):
        yield Case(
            _row(tensors, "dense", backend=name, density=1.0),
            run,
            partial(check_attention, tensors=tensors, num_keys=num_keys),
            tensors.dense_flops,
        )


def sparse_cases(tensors: AttentionTensors, grid: SparseGrid) -> Iterator[Case]:
    """Scoring, selection and attention separately, then `xattention`, which does all three."""
    estimates = [*itertools.product(grid.strides, grid.precisions)]
    for estimate in estimates:
        stride, precision = estimate
        how = {"stride": stride, "precision": precision}
        score = partial(
            block_scores,
            tensors.query,
            tensors.key,
            stride=stride,
            causal=tensors.causal,
            precision=precision,
        )
        check = partial(check_scores, tensors=tensors, stride=stride)
        yield Case(_row(tensors, "scoring", **how), score, check)
        try:
            scores = score()
        except (ValueError, RuntimeError):
            # The scoring row reports the failure; rows that need the scores are omitted.
            continue
        forced = tensors.forced_blocks()
        for tau, wanted in _thresholds(grid, scores, forced):
            blocks = select_block_lists(scores, tau, forced)
            chosen = {**how, "threshold": tau, "density": density_of(blocks, forced), **wanted}
            yield _selection_case(tensors, blocks, scores, chosen)
            for backend in grid.backends:
                columns = {"backend": backend, **chosen}
                if estimate == estimates[0]:
                    yield _attention_case(tensors, blocks, columns)
                yield _xattention_case(tensors, blocks, columns)


def _thresholds(
    grid: SparseGrid, scores: Tensor, forced: ForcedBlocks
) -> Iterator[tuple[float, Columns]]:
    """Each threshold, with the density that it was chosen for, if any."""
    for tau in grid.thresholds:
        yield tau, {}
    for density in grid.densities:
        yield threshold_for_density(scores, density, forced), {"wanted_density": density}


def _selection_case(
    tensors: AttentionTensors, blocks: BlockLists, scores: Tensor, chosen: Columns
) -> Case:
    """The selection; with a model's tensors also the share of true attention that it keeps."""
    tau, forced = chosen["threshold"], tensors.forced_blocks()
    quality = partial(selection_quality, tensors, blocks.to_mask(), chosen["stride"], tau)
    return Case(
        _row(tensors, "selection", **chosen),
        partial(select_block_lists, scores, tau, forced),
        lambda found: check_selection(found.to_mask(), scores, tau, forced.to_mask(scores.device)),
        more=quality if tensors.from_model else None,
    )


def _attention_case(tensors: AttentionTensors, blocks: BlockLists, columns: Columns) -> Case:
    """Attention over the selected blocks, from their lists."""

    def run() -> Tensor:
        query, key, value = tensors.query, tensors.key, tensors.value
        scale = query.shape[-1] ** -0.5
        inputs = AttentionInputs(
            query, key, value, blocks, BLOCK_SIZE, tensors.causal, None, scale
        )
        return compute_attention(inputs, columns["backend"])[0]

    return Case(
        _row(tensors, "attention", **columns),
        run,
        partial(check_attention, tensors=tensors, block_mask=blocks.to_mask()),
        tensors.dense_flops * columns["density"],
    )


def _xattention_case(tensors: AttentionTensors, blocks: BlockLists, columns: Columns) -> Case:
    """All of XAttention, which must select the same blocks as its parts."""
    run = partial(
        xattention,
        tensors.query,
        tensors.key,
        tensors.value,
        threshold=columns["threshold"],
        stride=columns["stride"],
        causal=tensors.causal,
        scoring_precision=columns["precision"],
        num_text_tokens=tensors.num_text_tokens,
        backend=columns["backend"],
    )
    check = partial(check_attention, tensors=tensors, block_mask=blocks.to_mask())
    return Case(_row(tensors, "xattention", **columns), run, check)


def _row(tensors: AttentionTensors, name: Part, **columns: object) -> Columns:
    return {"name": name, "backend": None, **tensors.describe(), **columns}


def measure_cases(
    cases: Iterable[Case], device: torch.device, budget: Budget
) -> Iterator[tuple[Columns, bool]]:
    """Check and time each case; yield its row and True, or its columns, the failure and False.

    A failure does not stop the next cases.
    """
    iterator = iter(cases)
    while True:
        case: Case | None = None
        try:
            with torch.no_grad():
                case = next(iterator, None)
                if case is None:
                    return
                row, done = _measure_case(case, device, budget), True
        # Kernels, compilers and other packages may raise anything; it is this row's failure.
        except Exception as failure:
            row = {} if case is None else case.row
            row, done = row | {"failure": f"{type(failure).__name__}: {failure}"}, False
        # Free the memory that the case or its exception still holds.
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        yield row, done


def _measure_case(case: Case, device: torch.device, budget: Budget) -> Columns:
    with time_limit(budget.max_seconds + _SECONDS_TO_COMPILE):
        row = case.row | {"error": case.check(case.run())} | measure(case.run, device, budget)
        if case.more is not None:
            row |= case.more()
    return row if case.flops is None else row | {"tflops": case.flops / row["latency_ms"] / 1e9}
