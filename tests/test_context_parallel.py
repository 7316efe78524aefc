"""Several ranks share a video, and compute what one process does."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from diffusers import (
    ContextParallelConfig,
)
from hunyuan import (
    CHANNELS,
    HEAD_DIM,
    TEXT_TOKENS,
    forward_inputs,
    generate,
    prompt,
    tiny_pipeline,
    tiny_processor,
    tiny_transformer,
)
from ranks import run_ranks

from xattn_video import (
    ThresholdSchedule,
    enable_context_parallel,
    enable_xattention,
)
from xattn_video.processors.context_parallel import HUNYUAN_VIDEO_PLAN
from xattn_video.processors.head_exchange import HeadExchange

HEADS = 12
BY_HEAD = ThresholdSchedule(
    ((0, 0.5),), heads={(1, 0): ((0, 0.9),), (1, 5): ((0, 0.2),), (3, 4): ((0, 0.8),)}
)
COUNTED = {"density": 0.4, "token_order": "hilbert", "compensation": "first-order"}
# Frames, rows and columns of latents; valid text tokens; options of the processor.
CASES: dict[str, tuple[tuple[int, int, int], tuple[int, ...], dict[str, Any]]] = {
    "even": ((3, 8, 8), (16,), {"threshold": 0.5}),
    "padded": ((3, 8, 8), (5,), {"threshold": 0.5}),
    "uneven": ((5, 10, 14), (5,), {"threshold": 0.5}),
    "batch": ((5, 10, 14), (10, 3), {"threshold": 0.6}),
    "by head": ((5, 10, 14), (9,), {"threshold": BY_HEAD}),
    "dense": ((5, 10, 14), (5,), {"threshold": 0.5, "warmup_steps": 9}),
    "dense batch": ((3, 8, 8), (10, 3), {"threshold": 0.5, "warmup_steps": 9}),
    "by density": ((5, 10, 14), (5,), {"threshold": None, "density": 0.3}),
    "refreshed": ((5, 10, 14), (10, 3), {"threshold": 0.5, "refresh_every": 2}),
    "skipped blocks count": ((5, 10, 14), (10, 3), {"threshold": None} | COUNTED),
    "kept blocks": ((5, 10, 14), (5,), {"threshold": None, "mask_every": 2} | COUNTED),
    "all of it": ((5, 10, 14), (5,), {"threshold": None, "refresh_every": 2} | COUNTED),
}
SOME = ("uneven", "batch", "by head", "dense")


def with_heads() -> torch.nn.Module:
    return tiny_transformer(num_attention_heads=HEADS)


def latents_of(size: tuple[int, int, int], lengths: tuple[int, ...]) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(len(lengths), CHANNELS, *size, generator=generator)
    return forward_inputs(lengths=lengths) | {"hidden_states": latents}


def two_steps(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
    steps = [inputs | {"timestep": inputs["timestep"] - less} for less in (0, 100)]
    with torch.no_grad():
        return torch.cat([model(**step).sample for step in steps])


def kept(processor: Any) -> list[list[int | None]]:
    return [[layer.kept for layer in forward.layers] for forward in processor.report().forwards]


def compare(split: Any, case: str) -> dict[str, Any]:
    """Two steps of one process beside those of a transformer that `split` gives."""
    size, lengths, given = CASES[case]
    options = {"warmup_steps": 0} | given
    inputs = latents_of(size, lengths)
    alone, alone_processor = with_heads(), tiny_processor(**options)
    alone.set_attn_processor(alone_processor)
    expected = two_steps(alone, inputs)
    transformer, processor = split(tiny_processor(**options))
    shapes = set()
    processor.observers.append(lambda seen: shapes.add(tuple(seen.query.shape)))
    found = two_steps(transformer, inputs)
    return {
        "difference": (found - expected).abs().max().item(),
        "kept": kept(processor),
        "expected kept": kept(alone_processor),
        "imbalance": [forward.imbalance for forward in processor.report().forwards],
        "summary": processor.report().summary(),
        "expected summary": alone_processor.report().summary(),
        "shapes": [list(shape) for shape in shapes],
    }


def ours(processor: Any) -> tuple[Any, Any]:
    transformer = with_heads()
    transformer.set_attn_processor(processor)
    enable_context_parallel(transformer)
    return transformer, processor


def as_diffusers_documents_it(processor: Any) -> tuple[Any, Any]:
    transformer = with_heads()
    transformer.set_attn_processor(processor)
    config = ContextParallelConfig(ulysses_degree=dist.get_world_size())
    transformer.enable_parallelism(config=config)
    return transformer, processor


def before_the_processor(processor: Any) -> tuple[Any, Any]:
    transformer = with_heads()
    config = ContextParallelConfig(ulysses_degree=dist.get_world_size())
    transformer.enable_parallelism(config=config, cp_plan=HUNYUAN_VIDEO_PLAN)
    transformer.set_attn_processor(processor)
    return transformer, processor


def with_enable_xattention(processor: Any) -> tuple[Any, Any]:
    pipe = tiny_pipeline(with_heads())
    enable_context_parallel(pipe)
    handle = enable_xattention(pipe, processor.settings)
    return pipe.transformer, handle.processor


def compiled(processor: Any) -> tuple[Any, Any]:
    transformer, processor = ours(processor)
    transformer.compile_repeated_blocks(fullgraph=True, backend="eager")
    return transformer, processor


def offloaded(processor: Any) -> tuple[Any, Any]:
    transformer, processor = ours(processor)
    cpu = torch.device("cpu")
    transformer.enable_group_offload(onload_device=cpu, offload_device=cpu, num_blocks_per_group=1)
    return transformer, processor


WAYS = {
    "as Diffusers documents it": (as_diffusers_documents_it, "padded"),
    "before the processor": (before_the_processor, "padded"),
    "with enable_xattention": (with_enable_xattention, "padded"),
    "compiled": (compiled, "batch"),
    "with group offloading": (offloaded, "uneven"),
}


def pipeline_latents(split: bool) -> torch.Tensor:
    pipe = tiny_pipeline(with_heads())
    if split:
        enable_context_parallel(pipe)
    enable_xattention(pipe, tiny_processor(0.6, warmup_steps=1, cooldown_steps=1).settings)
    options = {"negative_" + name: value for name, value in prompt((4, 9), seed=1).items()}
    return generate(pipe, lengths=(10, 3), true_cfg_scale=2.0, **options)


def all_cases() -> dict[str, Any]:
    return {case: compare(ours, case) for case in CASES}


def all_cases_and_ways() -> dict[str, Any]:
    found = all_cases()
    found |= {way: compare(split, case) for way, (split, case) in WAYS.items()}
    difference = pipeline_latents(True) - pipeline_latents(False)
    found["pipeline"] = difference.abs().max().item()
    return found


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """What each of two ranks found."""
    return run_ranks(all_cases_and_ways, 2, tmp_path_factory.mktemp("ranks"))


def some_cases() -> dict[str, Any]:
    return {case: compare(ours, case) for case in SOME}


@pytest.fixture(scope="module")
def three_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """What each of three ranks found."""
    return run_ranks(all_cases, 3, tmp_path_factory.mktemp("ranks"))


@pytest.fixture(scope="module")
def four_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """What each of four ranks found."""
    return run_ranks(some_cases, 4, tmp_path_factory.mktemp("ranks"))


def assert_same(ranks: list[Any], case: str) -> None:
    size, lengths, _ = CASES[WAYS[case][1] if case in WAYS else case]
    for rank in ranks:
        found = rank[case]
        assert found["difference"] == 0
        assert found["kept"] == found["expected kept"]
        assert found["summary"] == found["expected summary"]
        num_tokens = size[0] * size[1] * size[2] // 4 + TEXT_TOKENS
        assert found["shapes"] == [[len(lengths), num_tokens, HEADS // len(ranks), HEAD_DIM]]


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_compute_what_one_process_does(two_ranks, case):
    assert_same(two_ranks, case)


@pytest.mark.parametrize("case", CASES)
def test_three_ranks_compute_what_one_process_does(three_ranks, case):
    assert_same(three_ranks, case)


@pytest.mark.parametrize("case", SOME)
def test_four_ranks_compute_what_one_process_does(four_ranks, case):
    assert_same(four_ranks, case)


def test_the_last_steps_counts_balance_the_next_step(two_ranks, three_ranks):
    for ranks in (two_ranks, three_ranks):
        first, second = ranks[0]["by head"]["imbalance"]
        assert 1 <= second < first
        assert all(rank["by head"]["imbalance"] == [first, second] for rank in ranks)
        assert ranks[0]["by density"]["imbalance"] == [1, 1]
        assert ranks[0]["dense"]["imbalance"] == [None, None]


def test_heads_of_unequal_work_are_dealt_out_to_and_fro():
    counts = torch.tensor([9, 1, 8, 2, 7, 3])
    exchange = HeadExchange(None, 0, 3, 6, 12, 4)
    order = exchange.balanced_order(counts)
    assert order.tolist() == [0, 1, 2, 3, 4, 5]
    assert exchange.imbalance(counts) == 1
    contiguous = counts.sort().values
    assert exchange.imbalance(contiguous) == 1.7
    assert exchange.ordered(exchange.balanced_order(contiguous)).imbalance(contiguous) == 1


@pytest.mark.parametrize("way", WAYS)
def test_every_way_to_switch_it_on_is_exact(two_ranks, way):
    assert_same(two_ranks, way)


def test_a_pipeline_with_guidance_gives_the_same_latents(two_ranks):
    assert [rank["pipeline"] for rank in two_ranks] == [0, 0]


def one_video_for_each_pair() -> float:
    inputs = forward_inputs(seed=dist.get_rank() // 2)
    alone, transformer = tiny_transformer(), tiny_transformer()
    alone.set_attn_processor(tiny_processor(warmup_steps=0))
    transformer.set_attn_processor(tiny_processor(warmup_steps=0))
    enable_context_parallel(transformer, 2)
    return (two_steps(transformer, inputs) - two_steps(alone, inputs)).abs().max().item()


def test_pairs_of_ranks_each_have_a_video_of_their_own(tmp_path):
    assert run_ranks(one_video_for_each_pair, 4, tmp_path) == [0, 0, 0, 0]
