"""The rows of a benchmark: what is run, how it is checked, and what came out."""

import gc
import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from xattn_video.benchmark.checks import check_attention, check_scores, check_selection
from xattn_video.benchmark.dense import dense_kernels
from xattn_video.benchmark.problems import (
    BLOCK_SIZE,
    AttentionTensors,
    density_of,
    threshold_for_density,
)
from xattn_video.benchmark.quality import selection_quality
from xattn_video.benchmark.timing import Budget, measure, time_limit
from xattn_video.ops.attention import compute_attention, xattention
from xattn_video.ops.blocks import BlockLists
from xattn_video.ops.forced import ForcedBlocks
from xattn_video.ops.problem import AttentionInputs
from xattn_video.ops.scoring import Precision, block_scores
from xattn_video.ops.selection import select_block_lists

Part = Literal["dense", "scoring", "selection", "attention", "xattention"]
Row = dict[str, Any]

# A row may compile for longer than it is timed for.
_SECONDS_TO_COMPILE = 60.0


@dataclass(frozen=True, slots=True)
class Case:
    """One row to be measured.

    Attributes:
        row: Its columns, those that are known before it runs.
        check: Runs it once and compares it with the formula; its error, or an exception.
        run: What is timed.
        flops: Of matrix products, where the row is about them.
        more: Further columns, computed after the row was timed.
    """

    row: Row
    check: Callable[[], float]
    run: Callable[[], object]
    flops: float | None = None
    more: Callable[[], Row] | None = None


@dataclass(frozen=True, slots=True)
class SparseSettings:
    """Which sparse rows to measure: every combination of what is listed.

    A density stands for the threshold that gives it on the tensors at hand. `attention` rows
    belong to the first stride and precision alone.
    """

    densities: tuple[float, ...] = ()
    thresholds: tuple[float, ...] = ()
    strides: tuple[int, ...] = (8,)
    backends: tuple[str, ...] = ("auto",)
    precisions: tuple[Precision, ...] = ("exact",)


def dense_cases(tensors: AttentionTensors) -> Iterator[Case]:
    """A row for each dense kernel that is present."""
    for name, run, num_keys in dense_kernels(tensors):
        yield Case(
            _row(tensors, "dense", backend=name, density=1.0),
            partial(_dense_error, run, tensors, num_keys),
            run,
            tensors.dense_flops,
        )


def sparse_cases(tensors: AttentionTensors, settings: SparseSettings) -> Iterator[Case]:
    """Scoring, selection and attention apart, then `xattention`, which is all of them."""
    forced = tensors.forced_blocks()
    estimates = [*itertools.product(settings.strides, settings.precisions)]
    for estimate in estimates:
        stride, precision = estimate
        how = {"stride": stride, "precision": precision}
        score = partial(
            block_scores, tensors.query, tensors.key, stride=stride, precision=precision
        )
        yield Case(
            _row(tensors, "scoring", **how), partial(_scoring_error, score, tensors, stride), score
        )
        try:
            scores = score()
        except (ValueError, RuntimeError):
            # Its own row says why; what rests on it is left out.
            continue
        for tau, wanted in _thresholds(settings, scores, forced):
            select = partial(select_block_lists, scores, tau, forced)
            blocks = select()
            chosen = {**how, "threshold": tau, "density": density_of(blocks), **wanted}
            yield Case(
                _row(tensors, "selection", **chosen),
                partial(_selection_error, select, scores, tau, forced),
                select,
                more=_quality_of(tensors, blocks, chosen),
            )
            for backend in settings.backends:
                if estimate == estimates[0]:
                    yield _attention_case(tensors, blocks, backend, chosen)
                yield _xattention_case(tensors, backend, chosen)


def _thresholds(
    settings: SparseSettings, scores: Tensor, forced: ForcedBlocks
) -> Iterator[tuple[float, Row]]:
    """Each threshold, and the density that it stands for, if it does."""
    for tau in settings.thresholds:
        yield tau, {}
    for density in settings.densities:
        yield threshold_for_density(scores, density, forced), {"wanted_density": density}


def _dense_error(run: Callable[[], Tensor], tensors: AttentionTensors, num_keys: int) -> float:
    return check_attention(run(), tensors, None, num_keys)


def _scoring_error(run: Callable[[], Tensor], tensors: AttentionTensors, stride: int) -> float:
    return check_scores(run(), tensors, stride)


def _selection_error(
    run: Callable[[], BlockLists], scores: Tensor, threshold: float, forced: ForcedBlocks
) -> float:
    return check_selection(run().to_mask(), scores, threshold, forced.to_mask(scores.device))


def _quality_of(
    tensors: AttentionTensors, blocks: BlockLists, chosen: Row
) -> Callable[[], Row] | None:
    """What the selection keeps of the true attention; of random tensors it says nothing."""
    if not tensors.from_model:
        return None
    mask = blocks.to_mask()
    return partial(selection_quality, tensors, mask, chosen["stride"], chosen["threshold"])


def _attention_case(
    tensors: AttentionTensors, blocks: BlockLists, backend: str, chosen: Row
) -> Case:
    """Attention over the selected blocks, from their lists."""

    def run() -> Tensor:
        query, key, value = tensors.query, tensors.key, tensors.value
        scale = query.shape[-1] ** -0.5
        inputs = AttentionInputs(query, key, value, blocks, BLOCK_SIZE, False, None, scale)
        return compute_attention(inputs, backend)[0]

    return Case(
        _row(tensors, "attention", backend=backend, **chosen),
        lambda: check_attention(run(), tensors, blocks.to_mask()),
        run,
        tensors.dense_flops * chosen["density"],
    )


def _xattention_case(tensors: AttentionTensors, backend: str, chosen: Row) -> Case:
    """The whole of XAttention."""
    run = partial(
        xattention,
        tensors.query,
        tensors.key,
        tensors.value,
        threshold=chosen["threshold"],
        stride=chosen["stride"],
        scoring_precision=chosen["precision"],
        num_text_tokens=tensors.num_text_tokens,
        backend=backend,
    )

    def check() -> float:
        out, mask = run(return_block_mask=True)
        return check_attention(out, tensors, mask)

    return Case(_row(tensors, "xattention", backend=backend, **chosen), check, run)


def _row(tensors: AttentionTensors, name: Part, **columns: object) -> Row:
    return {"name": name, "backend": None, **tensors.describe(), **columns}


def measure_cases(
    cases: Iterable[Case], device: torch.device, budget: Budget
) -> Iterator[tuple[Row, bool]]:
    """Check and time each case: its finished row and True, or its columns, the failure and False.

    Nothing that fails keeps the next case from being measured.
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
        # Whatever a kernel, its compiler or another's checkout may raise is that row's failure.
        except Exception as failure:
            row = {} if case is None else case.row
            row, done = row | {"failure": f"{type(failure).__name__}: {failure}"}, False
        _release_memory(device)
        yield row, done


def _measure_case(case: Case, device: torch.device, budget: Budget) -> Row:
    with time_limit(budget.max_seconds + _SECONDS_TO_COMPILE):
        error = case.check()
        row = case.row | {"error": error} | measure(case.run, device, budget)
        if case.more is not None:
            row |= case.more()
    if case.flops is not None:
        row["tflops"] = case.flops / row["latency_ms"] / 1e9
    return row


def _release_memory(device: torch.device) -> None:
    """Give back what a case, or its exception, has left."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
