"""Times whole denoising steps of a full-size HunyuanVideo transformer with random weights.

    python -m benchmarks.step --thresholds 0.345 0.455 --output results.json

Random weights prove speed and memory, never quality: their attention is nearly uniform, so the
density comes out near the threshold. Scoring and selection are included.
"""

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from diffusers import HunyuanVideoTransformer3DModel

from benchmarks.measure import save_rows
from xattn_video import XAttnProcessor, enable_xattention

TEXT_TOKENS = 256


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--height", type=int, default=720)
    parser.add_argument("--width", type=int, default=1280)
    parser.add_argument("--num-frames", type=int, default=129)
    parser.add_argument("--valid-text-tokens", type=int, default=60)
    parser.add_argument("--thresholds", type=float, nargs="*", default=[0.345, 0.455])
    parser.add_argument("--stride", type=int, default=8)
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--skip-stock", action="store_true", help="only this package's steps")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()

    device = torch.device("cuda")
    transformer = random_transformer(device)
    inputs = step_inputs(arguments, transformer.config.in_channels, device)
    warm_up = step_inputs(arguments, transformer.config.in_channels, device, frames=9)
    grid = inputs["hidden_states"].shape[2:]
    common = {
        "name": "step",
        "height": arguments.height,
        "width": arguments.width,
        "num_frames": arguments.num_frames,
        "n": grid[0] * grid[1] * grid[2] // 4 + TEXT_TOKENS,
        "valid_text_tokens": arguments.valid_text_tokens,
    }
    rows: list[dict[str, Any]] = []

    def measure(row: dict[str, Any], processor: XAttnProcessor | None) -> None:
        for sizes in (warm_up, inputs):
            row |= time_step(transformer, sizes, processor, arguments.repeats)
        rows.append(common | row)
        print(rows[-1], flush=True)
        if arguments.output:
            save_rows(arguments.output, device, rows)

    with torch.no_grad():
        if not arguments.skip_stock:
            measure({"phase": "stock"}, None)
        for tau in [1.0, *arguments.thresholds]:
            options = {"warmup_steps": 0, "stride": arguments.stride, "backend": arguments.backend}
            with enable_xattention(transformer, tau, **options) as handle:
                phase = {"phase": "dense"} if tau == 1 else {"phase": "sparse", "threshold": tau}
                measure(phase | {"stride": arguments.stride}, handle.processor)


def random_transformer(device: torch.device) -> HunyuanVideoTransformer3DModel:
    """HunyuanVideo's transformer in bfloat16, weights drawn at random on the device."""
    previous = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            transformer = HunyuanVideoTransformer3DModel()
    finally:
        torch.set_default_dtype(previous)
    return transformer.eval().requires_grad_(False)


def step_inputs(
    arguments: argparse.Namespace, channels: int, device: torch.device, frames: int | None = None
) -> dict[str, torch.Tensor]:
    """The keyword arguments of one forward at the problem's size."""
    latent_frames = ((frames or arguments.num_frames) - 1) // 4 + 1
    size = (1, channels, latent_frames, arguments.height // 8, arguments.width // 8)
    mask = torch.zeros(1, TEXT_TOKENS, dtype=torch.long, device=device)
    mask[:, : arguments.valid_text_tokens] = 1

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=device, dtype=torch.bfloat16)

    return {
        "hidden_states": normal(*size),
        "timestep": torch.tensor([500.0], device=device),
        "encoder_hidden_states": normal(1, TEXT_TOKENS, 4096),
        "encoder_attention_mask": mask,
        "pooled_projections": normal(1, 768),
        "guidance": torch.tensor([6000.0], device=device, dtype=torch.bfloat16),
    }


def time_step(
    transformer: HunyuanVideoTransformer3DModel,
    inputs: dict[str, torch.Tensor],
    processor: XAttnProcessor | None,
    repeats: int,
) -> dict[str, Any]:
    """Seconds of the fastest of ``repeats`` forwards, peak memory and what the report says."""
    torch.cuda.reset_peak_memory_stats()
    seconds = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        start = time.perf_counter()
        sample = transformer(**inputs, return_dict=False)[0]
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    if not bool(sample.isfinite().all()):
        raise SystemExit("the step's output is not finite; nothing is recorded.")
    row: dict[str, Any] = {
        "seconds": min(seconds),
        "peak_memory_gib": torch.cuda.max_memory_allocated() / 2**30,
    }
    if processor is not None:
        row["report"] = processor.report().summary()
    return row


if __name__ == "__main__":
    main()
