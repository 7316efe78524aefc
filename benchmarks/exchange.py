"""Times the exchanges of one HunyuanVideo layer at 720x1280x129 on two GPUs, part by part.

torchrun --nproc-per-node 2 -m benchmarks.exchange --output results.json
"""

import time
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.launched_ranks import LaunchedRanks, launched_ranks
from benchmarks.results_writer import ResultsWriter, environment
from benchmarks.script_options import measuring_parser
from xattn_video.measure.timing import wait_for
from xattn_video.processors.head_exchange import HeadExchange
from xattn_video.reporting.endings import run_script


def main(words: list[str] | None = None) -> None:
    parser = measuring_parser(__doc__, "cuda")
    add = parser.add_argument
    add("--video-tokens", type=int, default=118_800)
    add("--text-tokens", type=int, default=256)
    add("--repeats", type=int, default=20)
    arguments = parser.parse_args(words)
    with launched_ranks(torch.device(arguments.device)) as ranks:
        path = arguments.output if ranks.is_first else None
        results = ResultsWriter(path, environment(ranks.device, arguments.commit))
        tokens = (arguments.video_tokens, arguments.text_tokens)
        for part, call in exchange_parts(ranks, *tokens).items():
            row = {"name": "exchange", "gpus": ranks.count, "part": part, "n": sum(tokens)}
            row["latency_ms"] = time_part(call, ranks, arguments.repeats)
            results.add(row, True)
            if ranks.is_first:
                print(f"{part:<40} {row['latency_ms']:8.3f} ms", flush=True)


def exchange_parts(
    ranks: LaunchedRanks, video_tokens: int, text_tokens: int
) -> dict[str, Callable[[], object]]:
    """{name: call to time}, in bfloat16 with HunyuanVideo's 24 heads of size 128."""
    heads, dim, device = 24, 128, ranks.device
    group = dist.group.WORLD
    plain = HeadExchange(group, ranks.rank, ranks.count, heads, video_tokens, text_tokens)
    torch.manual_seed(0)
    dealt = plain.ordered(torch.randperm(heads).to(device))

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, dtype=torch.bfloat16)

    own = plain.rows[ranks.rank]
    query, key, value = (normal(1, own + text_tokens, heads, dim) for _ in range(3))
    attended = normal(1, video_tokens + text_tokens, heads // ranks.count, dim)
    partner = ranks.count - 1 - ranks.rank
    sent, got = (normal(rows, heads // ranks.count, dim) for rows in (own, plain.rows[partner]))

    def swap() -> None:
        operations = [
            dist.P2POp(function, tensor, group=group, group_peer=partner)
            for function, tensor in ((dist.isend, sent), (dist.irecv, got))
        ]
        for work in dist.batch_isend_irecv(operations):
            work.wait()

    return {
        "to heads": lambda: plain.to_heads(query, key, value),
        "to heads, dealt out": lambda: dealt.to_heads(query, key, value),
        "to tokens": lambda: plain.to_tokens(attended),
        "to tokens, dealt out": lambda: dealt.to_tokens(attended),
        "swap of a rank's part of one tensor": swap,
    }


def time_part(call: Callable[[], object], ranks: LaunchedRanks, repeats: int) -> float:
    """Milliseconds per call, from many calls in a row."""
    for _ in range(3):
        call()
    _synchronize(ranks)
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    _synchronize(ranks)
    return (time.perf_counter() - start) / repeats * 1e3


def _synchronize(ranks: LaunchedRanks) -> None:
    wait_for(ranks.device)
    ranks.wait()


if __name__ == "__main__":
    run_script(main)
