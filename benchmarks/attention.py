"""Times dense attention, and XAttention part by part.

    python -m benchmarks.attention --problem hunyuan-720p-129f,sweep --output results.json
    python -m benchmarks.attention --problem cpu-sweep --device cpu --density 0.3

Every row is compared with the formula before it is timed; a row that differs or fails is listed as
a failure. `--then` starts another run in the same process and file; the options before it are the
defaults of those after it.
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from benchmarks import upstream
from benchmarks.inputs_file import input_names, load_inputs
from benchmarks.problems import GROUPS, PROBLEMS, find_problems
from benchmarks.results_writer import ResultsWriter, environment
from benchmarks.script_options import comma_separated, measuring_parser
from xattn_video.backends.table import available_backends
from xattn_video.files import user_path
from xattn_video.measure.attention_cases import (
    Case,
    SparseGrid,
    dense_cases,
    measure_cases,
    sparse_cases,
)
from xattn_video.measure.attention_problems import AttentionTensors, clustered_tensors
from xattn_video.measure.timing import Budget
from xattn_video.reporting.endings import run_script


def main(words: list[str] | None = None) -> None:
    runs = parse_runs(sys.argv[1:] if words is None else words)
    device = torch.device(runs[0].device)
    results = ResultsWriter(runs[0].output, environment(device, runs[0].commit))
    for arguments in runs:
        budget = Budget(arguments.repeats, arguments.max_seconds)
        for name, make_tensors in problems(arguments, device):
            for row, done in measure_cases(cases(make_tensors, arguments), device, budget):
                results.add({"problem": name} | row, done)
                print(describe_row(row), file=sys.stderr, flush=True)
    print_table(results)


def problems(
    arguments: argparse.Namespace, device: torch.device
) -> Iterator[tuple[str, Callable[[], AttentionTensors]]]:
    """Name of each problem, and a function that makes its tensors."""
    if arguments.inputs is not None:
        for name in input_names(arguments.inputs):
            yield name, partial(load_inputs, arguments.inputs, name, device, arguments.dtype)
        return
    for problem in find_problems(arguments.problem):
        dtype, focus = arguments.dtype, arguments.focus
        yield problem.name, partial(clustered_tensors, problem, device, dtype, focus=focus)


def parse_runs(words: list[str]) -> list[argparse.Namespace]:
    """The arguments of each run."""
    parser = make_parser()
    parsed = argparse.Namespace()
    runs = []
    while True:
        end = words.index("--then") if "--then" in words else len(words)
        parsed = parser.parse_args(words[:end], argparse.Namespace(**vars(parsed)))
        runs.append(parsed)
        if end == len(words):
            break
        words = words[end + 1 :]
    for run in runs:
        try:
            complete(run)
        except (ValueError, FileNotFoundError) as error:
            parser.error(str(error))
    return runs


def complete(run: argparse.Namespace) -> None:
    """Check combinations of arguments, and fill in their defaults."""
    on_gpu = torch.device(run.device).type == "cuda"
    run.dtype = getattr(torch, run.dtype or ("bfloat16" if on_gpu else "float32"))
    if not run.density and not run.threshold:
        run.density = [0.2, 0.345, 0.456]
    find_problems(run.problem)
    if run.inputs is not None and not run.inputs.is_file():
        raise FileNotFoundError(
            f"--inputs {run.inputs} is not a file; create it with benchmarks.demo_inputs."
        )
    run.time_upstream = upstream.find_checkouts(run.upstream)


def make_parser() -> argparse.ArgumentParser:
    parser = measuring_parser(__doc__)
    add = parser.add_argument
    names, numbers = comma_separated(str), comma_separated(float)
    known = ", ".join([*PROBLEMS, *GROUPS])
    add("--problem", type=names, default=["hunyuan-720p-129f"], help=f"any of {known}")
    add("--inputs", type=user_path, help="a file of benchmarks.demo_inputs, instead of --problem")
    add("--dtype", choices=("float32", "float16", "bfloat16"), help="bfloat16 on CUDA")
    add("--density", type=numbers, default=[], help="share of blocks to keep; sets the threshold")
    add("--threshold", type=numbers, default=[], help="share of the estimated mass to keep")
    strides = "strides; with the first, attention is also timed alone"
    add("--stride", type=comma_separated(int), default=[8], help=strides)
    add("--precision", type=names, default=["exact"], help="precision of scoring: exact, float8")
    add("--backends", type=names, help="default: all backends that can run")
    add("--dense", type=names, help="names of dense baselines, or none; default: all installed")
    checkout = "your checkout of x-attention, or of block_sparse_attn where it was built"
    add("--upstream", type=user_path, action="append", default=[], help=checkout)
    add("--focus", type=float, default=0.6, help="how much the mass of the random blocks varies")
    add("--repeats", type=int, default=10)
    add("--max-seconds", type=float, default=20.0, help="limit for one row, without compilation")
    return parser


def cases(
    make_tensors: Callable[[], AttentionTensors], arguments: argparse.Namespace
) -> Iterator[Case]:
    """All rows of one problem."""
    tensors = make_tensors()
    settings = SparseGrid(
        densities=tuple(arguments.density),
        thresholds=tuple(arguments.threshold),
        strides=tuple(arguments.stride),
        backends=tuple(arguments.backends or runnable_backends(tensors)),
        precisions=tuple(arguments.precision),
    )
    wanted = arguments.dense
    for case in dense_cases(tensors):
        if wanted is None or case.row["backend"] in wanted:
            yield case
    if arguments.time_upstream:
        yield from upstream.cases(tensors, settings)
    yield from sparse_cases(tensors, settings)


def runnable_backends(tensors: AttentionTensors) -> list[str]:
    """All backends that can run, without torch_gather on a GPU, where only tests use it."""
    query = tensors.query
    found = available_backends(query.device, dtype=query.dtype, head_dim=query.shape[-1])
    return [
        name
        for name, reasons in found.items()
        if not reasons and not (query.is_cuda and name == "torch_gather")
    ]


def describe_row(row: dict[str, Any]) -> str:
    """A row as one line of the table."""
    if "failure" in row:
        result = f"failed: {' '.join(row['failure'].split())[:160]}"
    else:
        tflops = f"{row['tflops']:6.3g} TFLOP/s" if "tflops" in row else ""
        memory = row["extra_memory_gib"]
        extra = "" if memory is None else f"{memory:6.2f} GiB"
        mass = f"kept mass {row['kept_mass']:.3f}" if "kept_mass" in row else ""
        result = f"{row['latency_ms']:10.2f} ms {extra} {tflops} {mass}".rstrip()
    stride = f"S={row['stride']}" if "stride" in row else ""
    stride += " float8" if row.get("precision") == "float8" else ""
    density = f"{row['density']:.3f}" if "density" in row else ""
    name, backend = row.get("name", "?"), row.get("backend") or ""
    return f"{row.get('n', ''):>7} {name:<10} {backend:<18} {stride:<11} {density:<6} {result}"


def print_table(results: ResultsWriter) -> None:
    """Print all rows, with a heading for each problem, then all failures."""
    print(f"{'N':>7} {'part':<10} {'by':<18} {'':<11} density")
    problem = None
    for row in results.rows:
        if row["problem"] != problem:
            problem = row["problem"]
            print(problem)
        print(describe_row(row))
    for row in results.failures:
        print(row["problem"], describe_row(row))


if __name__ == "__main__":
    run_script(main)
