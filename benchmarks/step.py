"""Times whole denoising steps of a full-size HunyuanVideo transformer with random weights.

    python -m benchmarks.step --threshold 0.345,0.455 --output results.json

Random weights prove speed and memory, never quality: their attention is nearly uniform, so the
density comes out near the threshold. Scoring and selection are included.
"""

import argparse
import time
from typing import Any

import torch
from diffusers import HunyuanVideoTransformer3DModel

from benchmarks.argument_types import comma_separated
from benchmarks.random_pipeline import new_weights
from benchmarks.results_files import AUTHORS
from benchmarks.results_writer import ResultsWriter, environment
from benchmarks.upstream import find_checkouts, has_kernel
from benchmarks.upstream_step import authors_processor
from xattn_video import XAttnProcessor, enable_xattention
from xattn_video.backends.dense import fastest_dense_kernel
from xattn_video.files import user_path
from xattn_video.measure.operator_checks import WrongResultError
from xattn_video.ops.problem import Problem
from xattn_video.ops.scoring import PRECISIONS, chosen_precision

TEXT_TOKENS = 256


def main(words: list[str] | None = None) -> None:
    arguments = parse_arguments(words)
    device = torch.device(arguments.device)
    transformer = random_transformer(device, arguments.layers)
    if arguments.compile:
        transformer.compile_repeated_blocks(fullgraph=True)
    results = ResultsWriter(arguments.output, environment(device, arguments.commit))
    with torch.no_grad():
        if not arguments.skip_stock:
            measure(transformer, None, {"phase": "stock", "backend": "stock"}, arguments, results)
        for tau in [1.0, *arguments.threshold]:
            options = {
                "warmup_steps": 0,
                "stride": arguments.stride,
                "backend": arguments.backend,
                "min_tokens": 0,
                "scoring_precision": arguments.precision,
            }
            with enable_xattention(transformer, tau, **options) as handle:
                row = {"phase": "dense", "stride": arguments.stride}
                if tau != 1:
                    row |= {"phase": "sparse", "threshold": tau}
                    row |= {"precision": arguments.precision}
                measure(transformer, handle.processor, row, arguments, results)
        for tau in arguments.threshold if arguments.time_upstream else []:
            transformer.set_attn_processor(authors_processor(tau, arguments.stride))
            row = {"phase": "sparse", "threshold": tau, "stride": arguments.stride}
            measure(transformer, None, row | {"backend": AUTHORS}, arguments, results)


def parse_arguments(words: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--height", type=int, default=720)
    add("--width", type=int, default=1280)
    add("--num-frames", type=int, default=129)
    add("--valid-text-tokens", type=int, default=60)
    add("--threshold", type=comma_separated(float), default=[0.345, 0.455])
    add("--stride", type=int, default=8)
    add("--precision", choices=PRECISIONS, default="auto", help="precision of scoring")
    add("--backend", default="auto")
    add("--device", default="cuda")
    add(
        "--layers",
        type=comma_separated(int),
        default=[20, 40],
        help="number of double-stream and single-stream blocks",
    )
    add("--skip-stock", action="store_true", help="time only this package's steps")
    add(
        "--compile",
        action="store_true",
        help="compile the transformer's blocks with torch.compile",
    )
    add("--repeats", type=int, default=1)
    checkout = "your checkout of x-attention; it needs the block_sparse_attn package"
    add("--upstream", type=user_path, action="append", default=[], help=checkout)
    add("--commit", help="commit of this repository, if git is not available")
    add("--output", type=user_path)
    arguments = parser.parse_args(words)
    try:
        arguments.time_upstream = find_checkouts(arguments.upstream)
    except FileNotFoundError as error:
        parser.error(str(error))
    if arguments.time_upstream and not has_kernel():
        parser.error("--upstream needs the block_sparse_attn package, which is not installed.")
    return arguments


def measure(
    transformer: HunyuanVideoTransformer3DModel,
    processor: XAttnProcessor | None,
    row: dict[str, Any],
    arguments: argparse.Namespace,
    results: ResultsWriter,
) -> None:
    """Add one row: a step of the full size, after a smaller step that compiles the kernels.

    The smaller step has 9 frames. With torch.compile it has the full size, to avoid recompiling.
    """
    config, device = transformer.config, torch.device(arguments.device)
    inputs = step_inputs(arguments, config, device)
    grid = inputs["hidden_states"].shape[2:]
    common = {
        "name": "step",
        "height": arguments.height,
        "width": arguments.width,
        "num_frames": arguments.num_frames,
        "layers": arguments.layers,
        "compiled": arguments.compile,
        "n": grid[0] * grid[1] * grid[2] // 4 + TEXT_TOKENS,
        "valid_text_tokens": arguments.valid_text_tokens,
        "batch": 1,
        "heads": config.num_attention_heads,
        "head_dim": config.attention_head_dim,
        "dtype": str(inputs["hidden_states"].dtype).removeprefix("torch."),
    }
    row = common | row
    if "precision" in row:
        problem = Problem(device, transformer.dtype, config.attention_head_dim, block_size=128)
        row["precision"] = chosen_precision(row["precision"], problem, row["stride"], row["n"])
    try:
        # What is compiled for a sparse step, or by torch.compile, depends on its size.
        by_size = arguments.compile or row["phase"] == "sparse"
        small = step_inputs(arguments, config, device, frames=9)
        time_step(transformer, inputs if by_size else small, processor, 1)
        row |= time_step(transformer, inputs, processor, arguments.repeats)
    # What one kind of step may raise keeps no other from being measured.
    except Exception as failure:
        results.add(row | {"failure": f"{type(failure).__name__}: {failure}"}, False)
        print(f"{row['phase']} failed: {' '.join(str(failure).split())}", flush=True)
        return
    results.add(row, True)
    density = f"density {row['density']:.3f}" if row.get("density") is not None else ""
    memory = "" if row["peak_memory_gib"] is None else f"{row['peak_memory_gib']:.1f} GiB"
    print(
        f"{row['phase']:<7} {row['backend'] or '':<8} {density:<14} "
        f"{row['latency_ms'] / 1e3:8.2f} s  {memory}",
        flush=True,
    )


def random_transformer(device: torch.device, layers: list[int]) -> HunyuanVideoTransformer3DModel:
    """HunyuanVideo's transformer in bfloat16, weights drawn at random on the device."""
    with new_weights(device, torch.bfloat16):
        transformer = HunyuanVideoTransformer3DModel(
            num_layers=layers[0], num_single_layers=layers[1]
        )
    return transformer.eval().requires_grad_(False)


def step_inputs(
    arguments: argparse.Namespace, config: Any, device: torch.device, frames: int | None = None
) -> dict[str, torch.Tensor]:
    """The keyword arguments of one forward at the problem's size."""
    latent_frames = ((frames or arguments.num_frames) - 1) // 4 + 1
    size = (1, config.in_channels, latent_frames, arguments.height // 8, arguments.width // 8)
    mask = torch.zeros(1, TEXT_TOKENS, dtype=torch.long, device=device)
    mask[:, : arguments.valid_text_tokens] = 1

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=device, dtype=torch.bfloat16)

    return {
        "hidden_states": normal(*size),
        "timestep": torch.tensor([500.0], device=device),
        "encoder_hidden_states": normal(1, TEXT_TOKENS, config.text_embed_dim),
        "encoder_attention_mask": mask,
        "pooled_projections": normal(1, config.pooled_projection_dim),
        "guidance": torch.tensor([6000.0], device=device, dtype=torch.bfloat16),
    }


def time_step(
    transformer: HunyuanVideoTransformer3DModel,
    inputs: dict[str, torch.Tensor],
    processor: XAttnProcessor | None,
    repeats: int,
) -> dict[str, Any]:
    """The fastest of ``repeats`` forwards, peak memory, and what the report says."""
    device = inputs["hidden_states"].device
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        sample = transformer(**inputs, return_dict=False)[0]
        # Waits for the device too.
        if not bool(sample.isfinite().all()):
            raise WrongResultError("the step's output is not finite; nothing is recorded.")
        seconds.append(time.perf_counter() - start)
    peak = torch.cuda.max_memory_allocated(device) / 2**30 if on_gpu else None
    row: dict[str, Any] = {"latency_ms": min(seconds) * 1e3, "peak_memory_gib": peak}
    if processor is not None:
        report = processor.report()
        row["density"] = report.density
        kind = (device, inputs["hidden_states"].dtype, transformer.config.attention_head_dim)
        row["backend"] = report.backends[0] if report.backends else fastest_dense_kernel(*kind)
        row["report"] = report.summary()
    return row


if __name__ == "__main__":
    main()
