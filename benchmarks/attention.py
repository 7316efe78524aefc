"""Times dense attention, and XAttention part by part, on one problem.

    python -m benchmarks.attention --problem hunyuan-720p-129f --output results.json
    python -m benchmarks.attention --problem cpu-8k --device cpu --threshold 0.5

Nothing is timed before it has been compared with dense attention in the same run.
"""

import argparse
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.measure import extra_memory_gib, latency_ms, save_rows
from benchmarks.problems import PROBLEMS, AttentionProblem, clustered_inputs, random_block_mask
from xattn_video import block_scores, block_sparse_attention, select_blocks, xattention
from xattn_video.registry import available_backends

Inputs = tuple[Tensor, Tensor, Tensor]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--problem", choices=PROBLEMS, default="hunyuan-720p-129f")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default=None, choices=("float32", "float16", "bfloat16"))
    parser.add_argument("--threshold", type=float, nargs="+", default=[0.9, 0.95])
    parser.add_argument("--density", type=float, nargs="*", default=[])
    parser.add_argument("--stride", type=int, nargs="+", default=[8])
    parser.add_argument("--focus", type=float, default=0.6)
    parser.add_argument("--backend", nargs="+", default=None, help="every one that can run")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()

    device = torch.device(arguments.device)
    default_dtype = "bfloat16" if device.type == "cuda" else "float32"
    dtype = getattr(torch, arguments.dtype or default_dtype)
    problem = PROBLEMS[arguments.problem]
    inputs = clustered_inputs(problem, device, dtype, focus=arguments.focus)
    backends = arguments.backend or [
        name
        for name, reasons in available_backends(
            device, dtype=dtype, head_dim=problem.head_dim
        ).items()
        if not reasons
    ]
    rows = []
    with torch.no_grad():
        for row, run in cases(problem, inputs, backends, arguments):
            row["latency_ms"] = latency_ms(run, device, repeats=arguments.repeats)
            row["extra_memory_gib"] = extra_memory_gib(run, device)
            work = problem.dense_flops * row["density"] if "density" in row else None
            if work and row["name"] in ("dense", "attention"):
                row["tflops"] = work / row["latency_ms"] / 1e9
            rows.append(row)
            print_row(row)
    if arguments.output:
        save_rows(arguments.output, device, rows)


def cases(
    problem: AttentionProblem, inputs: Inputs, backends: list[str], arguments: argparse.Namespace
) -> Iterator[tuple[dict[str, Any], Callable[[], object]]]:
    """Every row to measure, described, with the call to time."""
    query, key, _ = inputs
    common = {
        "problem": problem.name,
        "n": problem.length,
        "heads": problem.heads,
        "head_dim": problem.head_dim,
        "dtype": str(query.dtype).removeprefix("torch."),
    }
    for name, run in dense_kernels(inputs):
        yield common | {"name": "dense", "backend": name, "density": 1.0}, run
    for density in arguments.density:
        mask = random_block_mask(problem, density, query.device)
        for backend in backends:
            run = partial(block_sparse_attention, *inputs, mask, backend=backend)
            found = {"backend": backend, "density": mask.float().mean().item(), "mask": "random"}
            yield common | {"name": "attention"} | found, run
    for stride in arguments.stride:
        run = partial(block_scores, query, key, stride=stride)
        yield common | {"name": "scoring", "stride": stride}, run
        scores = run()
        for tau in arguments.threshold:
            chosen = {"stride": stride, "threshold": tau}
            mask = select_blocks(scores, tau)
            chosen["density"] = mask.float().mean().item()
            run = partial(select_blocks, scores, tau)
            yield common | {"name": "selection"} | chosen, run
            for backend in backends:
                check_against_dense(inputs, backend)
                named = chosen | {"backend": backend}
                run = partial(block_sparse_attention, *inputs, mask, backend=backend)
                yield common | {"name": "attention"} | named, run
                run = partial(xattention, *inputs, threshold=tau, stride=stride, backend=backend)
                yield common | {"name": "xattention"} | named, run


def dense_kernels(inputs: Inputs) -> Iterator[tuple[str, Callable[[], object]]]:
    """Dense SDPA through each kernel that runs here, and as stock Diffusers calls it."""
    query, key, _ = inputs
    kernels = {"sdpa": None}
    if query.is_cuda:
        kernels = {
            "sdpa flash": SDPBackend.FLASH_ATTENTION,
            "sdpa cudnn": SDPBackend.CUDNN_ATTENTION,
        }
    for name, kernel in kernels.items():

        def run(kernel: SDPBackend | None = kernel) -> Tensor:
            with sdpa_kernel(kernel) if kernel else nullcontext():
                return F.scaled_dot_product_attention(*inputs)

        yield name, run
    mask = torch.ones(1, 1, 1, key.shape[2], dtype=torch.bool, device=key.device)
    mask[..., -196:] = False
    yield "sdpa with padding mask", partial(F.scaled_dot_product_attention, *inputs, mask)


def check_against_dense(inputs: Inputs, backend: str) -> None:
    """Stop unless the backend, given every block of the first rows, is dense attention."""
    query, key, value = inputs
    query = query[:, :, : 128 * 3]
    mask = torch.ones(1, 1, 3, -(-key.shape[2] // 128), dtype=torch.bool, device=key.device)
    out = block_sparse_attention(query, key, value, mask, backend=backend).float()
    dense = F.scaled_dot_product_attention(query, key, value).float()
    error = ((out - dense).norm() / dense.norm()).item()
    if not error < 1e-2:
        raise SystemExit(
            f"{backend} differs from dense attention by {error:.2e}; nothing is timed."
        )


def print_row(row: dict[str, Any]) -> None:
    tau = f"tau {row['threshold']}" if "threshold" in row else ""
    density = f"density {row['density']:.3f}" if "density" in row else ""
    tflops = f"{row['tflops']:.0f} TFLOP/s" if "tflops" in row else ""
    print(
        f"{row['name']:<10} {row.get('backend', ''):<24} {tau:<9} {density:<14} "
        f"{row['latency_ms']:9.2f} ms  {tflops}",
        flush=True,
    )


if __name__ == "__main__":
    main()
