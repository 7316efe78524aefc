"""Times whole denoising steps of a full-size HunyuanVideo transformer with random weights.

    python -m benchmarks.step --threshold 0.345,0.455 --output results.json
    python -m benchmarks.step --threshold 0.345 --setting preset=balanced --output results.json
    torchrun --nproc-per-node 2 -m benchmarks.step --skip-stock --output results.json

With torchrun every step is measured first on one GPU, by all ranks at the same time, and then on
all GPUs together, with context parallelism. ``exchange_ms`` is the part of a step in which ranks
trade tokens for heads: the transfers and their copies, timed by themselves.

Random weights show speed and memory, but not quality: their attention is nearly uniform, so the
density is near the threshold. Scoring and selection are included.
"""

import argparse
import math
import time
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from diffusers import HunyuanVideoTransformer3DModel
from torch import Tensor

from benchmarks.launched_ranks import LaunchedRanks, launched_ranks
from benchmarks.random_pipeline import new_weights
from benchmarks.results_files import AUTHORS
from benchmarks.results_writer import ResultsWriter, environment
from benchmarks.script_options import comma_separated, measuring_parser
from benchmarks.upstream import find_checkouts, has_kernel
from benchmarks.upstream_step import authors_processor
from xattn_video import XAttnProcessor, enable_context_parallel, enable_xattention
from xattn_video.backends.dense import fastest_dense_kernel
from xattn_video.files import user_path
from xattn_video.measure.operator_checks import WrongResultError
from xattn_video.ops.problem import Problem
from xattn_video.ops.scoring import PRECISIONS, chosen_precision
from xattn_video.policy.presets import parse_setting
from xattn_video.processors.context_parallel import disable_context_parallel, exchange_of
from xattn_video.processors.families.hunyuan_video import HUNYUAN_VIDEO
from xattn_video.reporting.endings import run_script

TEXT_TOKENS = 256
# Largest difference relative to the norm; misplaced tokens or heads give more than 1.
LARGEST_DIFFERENCE = 0.25


def main(words: list[str] | None = None) -> None:
    arguments = parse_arguments(words)
    with launched_ranks(torch.device(arguments.device)) as ranks, torch.no_grad():
        # The same weights on every rank.
        torch.manual_seed(0)
        transformer = random_transformer(ranks.device, arguments.layers)
        if arguments.compile:
            transformer.compile_repeated_blocks(fullgraph=True)
        path = arguments.output if ranks.is_first else None
        results = ResultsWriter(path, environment(ranks.device, arguments.commit))
        bench = StepBench(transformer, arguments, results, ranks)
        if not arguments.skip_stock:
            bench.measure(None, {"phase": "stock", "backend": "stock"})
        bench.measure_steps({})
        for text in arguments.setting:
            bench.measure_setting(text)
        for tau in arguments.threshold if arguments.time_upstream else []:
            transformer.set_attn_processor(authors_processor(tau, arguments.stride))
            row = {"phase": "sparse", "threshold": tau, "stride": arguments.stride}
            bench.measure(None, row | {"backend": AUTHORS})
        if ranks.count > 1:
            enable_context_parallel(transformer)
            inputs = step_inputs(arguments, transformer.config, ranks.device)
            exchange_ms = time_exchanges(transformer, inputs)
            bench.measure_steps({"gpus": ranks.count, "exchange_ms": exchange_ms})
            disable_context_parallel(transformer)


def parse_arguments(words: list[str] | None) -> argparse.Namespace:
    parser = measuring_parser(__doc__, "cuda")
    add = parser.add_argument
    add("--height", type=int, default=720)
    add("--width", type=int, default=1280)
    add("--num-frames", type=int, default=129)
    add("--valid-text-tokens", type=int, default=60)
    add("--threshold", type=comma_separated(float), default=[0.345, 0.455])
    setting = "a whole setting, such as preset=fast or density=0.2,mask_every=4: each kind of step"
    add("--setting", action="append", default=[], help=setting)
    add("--stride", type=int, default=8)
    add("--precision", choices=PRECISIONS, default="auto", help="precision of scoring")
    add("--backend", default="auto")
    layers = "number of double-stream and single-stream blocks"
    add("--layers", type=comma_separated(int), default=[20, 40], help=layers)
    add("--skip-stock", action="store_true", help="time only this package's steps")
    add("--compile", action="store_true", help="compile the blocks with torch.compile")
    add("--repeats", type=int, default=1)
    checkout = "your checkout of x-attention; it needs the block_sparse_attn package"
    add("--upstream", type=user_path, action="append", default=[], help=checkout)
    arguments = parser.parse_args(words)
    try:
        arguments.time_upstream = find_checkouts(arguments.upstream)
    except FileNotFoundError as error:
        parser.error(str(error))
    if arguments.time_upstream and not has_kernel():
        parser.error("--upstream needs the block_sparse_attn package, which is not installed.")
    return arguments


@dataclass(slots=True)
class StepBench:
    """Measures steps of a transformer and records them.

    Args:
        transformer: The transformer, with the same weights on every rank.
        arguments: The arguments of the command line.
        results: The writer of the rows.
        ranks: The ranks, which all measure; the first one records.
        samples: {kind of step: its output on one GPU}.
    """

    transformer: HunyuanVideoTransformer3DModel
    arguments: argparse.Namespace
    results: ResultsWriter
    ranks: LaunchedRanks
    samples: dict[tuple[str, float | None], Tensor] = field(default_factory=dict)

    def measure_steps(self, common: dict[str, Any]) -> None:
        """Add rows of this package's dense and sparse steps."""
        arguments = self.arguments
        options = {
            "warmup_steps": 0,
            "stride": arguments.stride,
            "backend": arguments.backend,
            "min_tokens": 0,
            "scoring_precision": arguments.precision,
        }
        for tau in [1.0, *arguments.threshold]:
            with enable_xattention(self.transformer, tau, **options) as handle:
                row = common | {"phase": "dense", "stride": arguments.stride}
                if tau != 1:
                    row |= {"phase": "sparse", "threshold": tau}
                    row |= {"precision": arguments.precision}
                self.measure(handle.processor, row)

    def measure_setting(self, text: str) -> None:
        """Add a row for each kind of step that a setting has.

        With refreshes these are the last warm-up step, a step in between, and a refresh. Otherwise
        they are a step that chooses its blocks and, if there are any, one that reuses them.
        """
        arguments, ranks = self.arguments, self.ranks
        inputs = step_inputs(arguments, self.transformer.config, ranks.device)
        common = {"stride": arguments.stride, "min_tokens": 0}
        settings = parse_setting(text, **common, warmup_steps=0)
        phases = ["choose", "reuse"] if settings.mask_every > 1 else ["choose"]
        timed = replace(settings, mask_every=len(phases))
        if settings.refresh_every is not None:
            phases = ["prime", "between", "refresh"]
            timed = replace(settings, refresh_every=2, warmup_steps=1)
        row = {"gpus": 1, "setting": text} | self._sizes(inputs)
        with enable_xattention(self.transformer, timed) as handle:
            # The first round compiles kernels.
            for is_timed in (False, True):
                for number, phase in enumerate(phases):
                    inputs["timestep"].fill_(900.0 - 100 * number)
                    found, _ = time_step(self.transformer, inputs, handle.processor, ranks)
                    if is_timed:
                        self.results.add(row | {"phase": phase} | found, True)
                    if is_timed and ranks.is_first:
                        print(describe(row | {"phase": phase} | found), flush=True)

    def measure(self, processor: XAttnProcessor | None, row: dict[str, Any]) -> None:
        """Add one row: a step of full size, after a step that compiles kernels.

        That step has 9 frames, unless kernels must be compiled for the full size.
        """
        arguments, ranks = self.arguments, self.ranks
        config, device = self.transformer.config, ranks.device
        inputs = step_inputs(arguments, config, device)
        row = {"gpus": 1} | self._sizes(inputs) | row
        if "precision" in row:
            problem = Problem(device, self.transformer.dtype, config.attention_head_dim, 128)
            row["precision"] = chosen_precision(row["precision"], problem, row["stride"], row["n"])
        try:
            # Kernels of sparse steps, and torch.compile's, are compiled for the size.
            by_size = arguments.compile or row["phase"] == "sparse"
            small = step_inputs(arguments, config, device, frames=9)
            time_step(self.transformer, inputs if by_size else small, processor, ranks)
            for _ in range(arguments.repeats):
                found, sample = time_step(self.transformer, inputs, processor, ranks)
                if found["latency_ms"] < row.get("latency_ms", math.inf):
                    row |= found
            row |= self._beside_one_gpu(row, sample)
        # An error of one kind of step must not stop the others from being measured.
        except Exception as failure:
            if ranks.count > 1:
                # Other ranks may be waiting for this one.
                raise
            self.results.add(row | {"failure": f"{type(failure).__name__}: {failure}"}, False)
            print(f"{row['phase']} failed: {' '.join(str(failure).split())}", flush=True)
            return
        self.results.add(row, True)
        if ranks.is_first:
            print(describe(row), flush=True)

    def _sizes(self, inputs: dict[str, Tensor]) -> dict[str, Any]:
        arguments, config = self.arguments, self.transformer.config
        grid = inputs["hidden_states"].shape[2:]
        return {
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

    def _beside_one_gpu(self, row: dict[str, Any], sample: Tensor) -> dict[str, float]:
        """The relative difference of several GPUs' output from one GPU's, as a column.

        Raises:
            WrongResultError: The difference is too large.
        """
        if self.ranks.count == 1:
            return {}
        kind = (row["phase"], row.get("threshold"))
        if row["gpus"] == 1:
            self.samples[kind] = sample.float().cpu()
            return {}
        expected = self.samples[kind]
        difference = float((sample.float().cpu() - expected).norm() / expected.norm())
        if difference > LARGEST_DIFFERENCE:
            raise WrongResultError(
                f"the output of {row['gpus']} GPUs differs from that of one by {difference:.3f} "
                f"of its norm, at most {LARGEST_DIFFERENCE} is rounding; nothing is recorded."
            )
        return {"difference": difference}


def describe(row: dict[str, Any]) -> str:
    """A row as one line of text."""
    density = f"density {row['density']:.3f}" if row.get("density") is not None else ""
    memory = "" if row["peak_memory_gib"] is None else f"{row['peak_memory_gib']:.1f} GiB"
    line = (
        f"{row['phase']:<7} {row['backend'] or '':<8} {density:<14} "
        f"{row['latency_ms'] / 1e3:8.2f} s  {memory}"
    )
    if row["gpus"] > 1:
        line += (
            f"  {row['gpus']} GPUs, exchange {row['exchange_ms'] / 1e3:.2f} s, "
            f"{row['difference']:.1e} from one"
        )
    return line


def random_transformer(device: torch.device, layers: list[int]) -> HunyuanVideoTransformer3DModel:
    """HunyuanVideo's transformer in bfloat16, with random weights drawn on the device."""
    with new_weights(device, torch.bfloat16):
        transformer = HunyuanVideoTransformer3DModel(
            num_layers=layers[0], num_single_layers=layers[1]
        )
    return transformer.eval().requires_grad_(False)


def step_inputs(
    arguments: argparse.Namespace, config: Any, device: torch.device, frames: int | None = None
) -> dict[str, Tensor]:
    """The keyword arguments of one forward pass at the problem's size, equal in every call."""
    torch.manual_seed(1)
    latent_frames = ((frames or arguments.num_frames) - 1) // 4 + 1
    size = (1, config.in_channels, latent_frames, arguments.height // 8, arguments.width // 8)
    mask = torch.zeros(1, TEXT_TOKENS, dtype=torch.long, device=device)
    mask[:, : arguments.valid_text_tokens] = 1

    def normal(*shape: int) -> Tensor:
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
    inputs: dict[str, Tensor],
    processor: XAttnProcessor | None,
    ranks: LaunchedRanks,
) -> tuple[dict[str, Any], Tensor]:
    """Columns of one forward pass (latency, peak memory, values of the report), and its output."""
    device = ranks.device
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
    ranks.wait()
    start = time.perf_counter()
    sample = transformer(**inputs, return_dict=False)[0]
    # This also waits for the device.
    if not bool(sample.isfinite().all()):
        raise WrongResultError("the step's output is not finite; nothing is recorded.")
    seconds = time.perf_counter() - start
    peak = torch.cuda.max_memory_allocated(device) / 2**30 if on_gpu else None
    row: dict[str, Any] = {"latency_ms": seconds * 1e3, "peak_memory_gib": peak}
    if processor is not None:
        report = processor.report()
        row["density"] = report.density
        kind = (device, inputs["hidden_states"].dtype, transformer.config.attention_head_dim)
        row["backend"] = report.backends[0] if report.backends else fastest_dense_kernel(*kind)
        row["report"] = report.summary()
    return row, sample


def time_exchanges(
    transformer: HunyuanVideoTransformer3DModel, inputs: dict[str, Tensor], repeats: int = 5
) -> float:
    """Milliseconds that a step's layers take to trade tokens for heads, and back."""
    read = HUNYUAN_VIDEO.read_forward(transformer, inputs)
    layout = HUNYUAN_VIDEO.layout(transformer.config, read, read.device)
    exchange = exchange_of(transformer, HUNYUAN_VIDEO, layout)
    assert exchange is not None
    num_tokens = exchange.rows[exchange.rank] + layout.num_text_tokens
    query = torch.zeros(
        (1, num_tokens, exchange.num_heads, transformer.config.attention_head_dim),
        device=read.device,
        dtype=read.dtype,
    )

    def trade() -> None:
        out = exchange.to_tokens(exchange.to_heads(query, query, query)[0])
        # Reading a value waits for the device.
        float(out[0, 0, 0, 0])

    trade()
    start = time.perf_counter()
    for _ in range(repeats):
        trade()
    num_layers = len(HUNYUAN_VIDEO.attentions(transformer))
    return (time.perf_counter() - start) / repeats * num_layers * 1e3


if __name__ == "__main__":
    run_script(main)
