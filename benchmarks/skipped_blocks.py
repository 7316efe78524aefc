"""Times the additional work of compensation and token order in one sparse layer.

    python -m benchmarks.skipped_blocks --output skipped.json

The sizes are HunyuanVideo's at 720x1280x129. Compensation is compared with plain torch on the CPU
before it is timed.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from benchmarks.results_writer import ResultsWriter, environment
from benchmarks.script_options import comma_separated, measuring_parser
from xattn_video.measure.attention_problems import BLOCK_SIZE, AttentionProblem, clustered_tensors
from xattn_video.measure.operator_checks import WrongResultError
from xattn_video.measure.timing import Budget, measure
from xattn_video.ops.attention import compute_attention
from xattn_video.ops.blocks import BlockLists, ForcedBlocks, select_block_lists
from xattn_video.ops.compensation import compensate, error_weights
from xattn_video.ops.problem import AttentionInputs
from xattn_video.ops.scoring import ScoringInputs, compute_scores
from xattn_video.processors.layout import TokenLayout
from xattn_video.reporting.endings import run_script

Parts = dict[str, Callable[[], object]]
# Relative to the norm, as in the checks of attention.
_LARGEST_ERROR = 0.02
# An odd number; the round with the median latency counts.
_ROUNDS = 5


def main(words: list[str] | None = None) -> None:
    arguments = make_parser().parse_args(words)
    device = torch.device(arguments.device)
    layout = make_layout(arguments.grid, arguments.text_tokens, device)
    results = ResultsWriter(arguments.output, environment(device, arguments.commit))
    sizes = {"heads": arguments.heads, "head_dim": arguments.head_dim}
    shared = {"n": layout.num_tokens, "density": arguments.density, **sizes}
    with torch.no_grad():
        layer = SparseLayer.make(layout, arguments.density, arguments.backend, **sizes)
        layer.check()
        parts = {**layer.parts(), **preparation_parts(layout, **sizes)}
        budget = Budget(arguments.repeats, 1.0)
        # In rounds, because the clock of a GPU changes while it works.
        rounds = [[measure(run, device, budget) for run in parts.values()] for _ in range(_ROUNDS)]
        for part, measured in zip(parts, zip(*rounds, strict=True), strict=True):
            row = {"name": "skipped blocks", "part": part, "rounds": _ROUNDS, **shared}
            row |= sorted(measured, key=lambda one: one["latency_ms"] or 0)[_ROUNDS // 2]
            results.add(row, True)
            print(f"{part:<40} {row['latency_ms']:9.3f} ms", flush=True)


def make_parser() -> argparse.ArgumentParser:
    parser = measuring_parser(__doc__)
    add = parser.add_argument
    add("--grid", type=comma_separated(int), default=[33, 45, 80], help="frames, rows, columns")
    add("--text-tokens", type=int, default=256)
    add("--heads", type=int, default=24)
    add("--head-dim", type=int, default=128)
    add("--density", type=float, default=0.3)
    add("--backend", default="auto")
    add("--repeats", type=int, default=10)
    return parser


def make_layout(grid: list[int], text_tokens: int, device: torch.device) -> TokenLayout:
    """The layout of a video with this grid along a Hilbert curve, followed by text."""
    frames, rows, columns = grid
    raster = TokenLayout(
        frames * rows * columns, text_tokens, (text_tokens,), device, (frames, rows, columns)
    )
    return raster.along_hilbert_curve()


@dataclass(frozen=True, slots=True)
class SparseLayer:
    """Random tensors, the blocks chosen for them, and attention over these blocks.

    Attributes:
        forced: The forced blocks, which contain text.
        num_blocks: Number of key blocks with video only, which may be skipped.
        out: The output of the attention.
        lse: Its log-sum-exp.
    """

    inputs: AttentionInputs
    forced: ForcedBlocks
    backend: str
    density: Tensor
    num_blocks: int
    out: Tensor
    lse: Tensor

    @classmethod
    def make(
        cls, layout: TokenLayout, density: float, backend: str, heads: int, head_dim: int
    ) -> "SparseLayer":
        """Choose the blocks by their estimated error, as a layer with compensation does."""
        device, tokens = layout.device, layout.num_tokens
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        problem = AttentionProblem("layer", tokens, heads, head_dim)
        drawn = clustered_tensors(problem, device, dtype)
        forced = ForcedBlocks(tokens, tokens, BLOCK_SIZE, False, layout.num_text_tokens)
        num_blocks = layout.num_video_tokens // BLOCK_SIZE
        share = torch.tensor(density, device=device)
        scores = compute_scores(_scoring(drawn.query, drawn.key))
        scores *= error_weights(drawn.key, drawn.value, BLOCK_SIZE, num_blocks)[:, :, None]
        blocks = select_block_lists(scores, share, forced, True)
        tensors = (drawn.query, drawn.key, drawn.value)
        inputs = AttentionInputs(*tensors, blocks, BLOCK_SIZE, False, None, head_dim**-0.5)
        out, lse = compute_attention(inputs, backend, True)
        assert lse is not None
        return cls(inputs, forced, backend, share, num_blocks, out, lse)

    def check(self) -> None:
        """Compare the compensated output of one head with plain torch on the CPU.

        Raises:
            WrongResultError: The outputs differ.
        """
        found = compensate(self.inputs, self.out.clone(), self.lse, self.num_blocks, True)
        blocks = self.inputs.blocks
        query, key, value, out, lse, counts, indices = (
            one[:, :1].cpu()
            for one in (
                *(self.inputs.query, self.inputs.key, self.inputs.value),
                *(self.out, self.lse, blocks.counts, blocks.indices),
            )
        )
        first = replace(
            self.inputs,
            query=query.float(),
            key=key.float(),
            value=value.float(),
            blocks=BlockLists(counts, indices),
        )
        expected = compensate(first, out.float(), lse, self.num_blocks, True)
        error = ((found[:, :1].cpu().float() - expected).norm() / expected.norm()).item()
        if not error <= _LARGEST_ERROR:
            raise WrongResultError(f"compensation differs from plain torch by {error:.2g}.")

    def parts(self) -> Parts:
        """{name: call to time}, the parts of a layer with and without compensation."""
        inputs = self.inputs
        query, key, value = inputs.query, inputs.key, inputs.value
        scores = compute_scores(_scoring(query, key))

        def compensated(first_order: bool) -> Tensor:
            return compensate(inputs, self.out, self.lse, self.num_blocks, first_order)

        return {
            "scoring": lambda: compute_scores(_scoring(query, key)),
            "norms": lambda: error_weights(key, value, BLOCK_SIZE, self.num_blocks),
            "selection": lambda: select_block_lists(scores, self.density, self.forced, True),
            "attention": lambda: compute_attention(inputs, self.backend, False),
            "attention and log-sum-exp": lambda: compute_attention(inputs, self.backend, True),
            "compensation, means": lambda: compensated(False),
            "compensation, first-order": lambda: compensated(True),
        }


def _scoring(query: Tensor, key: Tensor) -> ScoringInputs:
    return ScoringInputs(query, key, BLOCK_SIZE, 8, False, None, query.shape[-1] ** -0.5)


def preparation_parts(layout: TokenLayout, heads: int, head_dim: int) -> Parts:
    """{name: call to time}, preparing tokens in both orders and restoring the output's order.

    Needs Triton.
    """
    from xattn_video.kernels.qk_norm_rope import qk_norm_rope

    device = layout.device
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, dtype=dtype)

    video = [normal(1, layout.num_video_tokens, heads, head_dim) for _ in range(3)]
    text = [normal(1, layout.num_text_tokens, heads, head_dim) for _ in range(3)]
    weights = [normal(head_dim) for _ in range(4)]
    cosines, sines = torch.randn(2, layout.num_video_tokens, head_dim, device=device)
    out = normal(1, layout.num_tokens, heads, head_dim)

    def prepared(count: int, places: Tensor | None) -> list[Tensor]:
        return qk_norm_rope(video[:count], text[:count], weights, (cosines, sines), 1e-6, places)

    return {
        "double-stream preparation, raster": lambda: prepared(3, None),
        "double-stream preparation, hilbert": lambda: prepared(3, layout.inverse),
        # In single-stream blocks values are already joined, so raster order leaves them in place.
        "single-stream preparation, raster": lambda: prepared(2, None),
        "single-stream preparation, hilbert": lambda: prepared(3, layout.inverse),
        "output in the model's order": lambda: layout.from_canonical(out),
    }


if __name__ == "__main__":
    run_script(main)
