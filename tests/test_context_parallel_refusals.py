"""What context parallelism refuses, and that switching it off or failing leaves nothing."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from diffusers import (
    ContextParallelConfig,
    FirstBlockCacheConfig,
    HunyuanVideoTransformer3DModel,
)
from diffusers.hooks import apply_context_parallel
from hunyuan import (
    forward_inputs,
    run,
    tiny_processor,
    tiny_transformer,
    with_processor,
)
from torch.testing._internal.distributed.fake_pg import FakeStore

from xattn_video import (
    UnsupportedModelError,
    disable_context_parallel,
    enable_context_parallel,
    enable_xattention,
)
from xattn_video.processors import context_parallel
from xattn_video.processors.context_parallel import HUNYUAN_VIDEO_PLAN, is_split


@pytest.fixture
def group(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], None]]:
    """Makes this process rank 0 of a group whose other ranks do not exist."""
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 1)

    def make(num_ranks: int) -> None:
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=num_ranks)

    yield make
    if dist.is_initialized():
        dist.destroy_process_group()


def is_on(transformer: Any) -> bool:
    return is_split(transformer) or transformer._parallel_config is not None


def test_heads_that_do_not_divide_are_refused_with_the_numbers_that_do(group):
    group(4)
    transformer = tiny_transformer(num_attention_heads=6)
    with pytest.raises(
        ValueError, match=r"6 heads cannot be divided evenly among 4 ranks; use 2, " r"3 or 6 r"
    ):
        enable_context_parallel(transformer)
    assert not is_on(transformer)
    # Diffusers asks nobody; the first forward pass does.
    transformer.set_attn_processor(tiny_processor())
    transformer.enable_parallelism(config=ContextParallelConfig(ulysses_degree=4))
    with pytest.raises(ValueError, match="6 heads cannot be divided evenly among 4 ranks"):
        run(transformer)


def test_a_degree_that_does_not_divide_the_ranks_is_refused(group):
    group(4)
    with pytest.raises(ValueError, match=r"degree=3 with 4 ranks; use 2 or 4\."):
        enable_context_parallel(tiny_transformer(), 3)


def test_without_torch_distributed_the_launcher_is_named():
    with pytest.raises(RuntimeError, match="start the script with torchrun"):
        enable_context_parallel(tiny_transformer())


def test_enabling_twice_is_refused(group):
    group(2)
    transformer = tiny_transformer()
    enable_context_parallel(transformer)
    with pytest.raises(RuntimeError, match="already enabled on this transformer"):
        enable_context_parallel(transformer)


def test_a_transformer_that_is_switched_off_computes_whole_videos(group):
    group(2)
    transformer, _ = with_processor()
    expected = run(transformer)
    enable_context_parallel(transformer)
    assert is_on(transformer)
    disable_context_parallel(transformer)
    assert not is_on(transformer)
    assert torch.equal(run(transformer), expected)


def fail_as_diffusers_does(transformer: Any) -> None:
    with pytest.raises(ValueError, match="`cp_plan` must be provided"):
        transformer.enable_parallelism(config=ContextParallelConfig(ulysses_degree=2))
    with pytest.raises(RuntimeError, match="already applied"):
        transformer.enable_parallelism(config=ContextParallelConfig(ulysses_degree=2))


def test_what_a_failed_attempt_left_is_cleared_up(group):
    group(2)
    transformer = tiny_transformer()
    fail_as_diffusers_does(transformer)
    enable_context_parallel(transformer)
    assert is_split(transformer)
    # Setting a processor clears up too, and brings the plan that was missing.
    transformer = tiny_transformer()
    fail_as_diffusers_does(transformer)
    transformer.set_attn_processor(tiny_processor())
    assert not is_on(transformer)
    transformer.enable_parallelism(config=ContextParallelConfig(ulysses_degree=2))
    assert is_split(transformer)


def test_an_attempt_that_fails_half_way_leaves_nothing(group, monkeypatch):
    group(2)
    transformer = tiny_transformer()

    def fail_half_way(model: Any, config: Any, plan: dict[str, Any]) -> None:
        apply_context_parallel(model, config, {"rope": plan["rope"]})
        raise OSError("the network is down")

    monkeypatch.setattr(context_parallel, "apply_context_parallel", fail_half_way)
    with pytest.raises(OSError, match="the network is down"):
        enable_context_parallel(transformer)
    assert not is_on(transformer)


def test_the_plan_leaves_with_the_processor(group):
    """Diffusers' own processor would be wrong with it."""
    group(2)
    transformer = tiny_transformer()
    with enable_xattention(transformer):
        assert transformer._cp_plan == HUNYUAN_VIDEO_PLAN
    assert transformer._cp_plan is None
    assert HunyuanVideoTransformer3DModel._cp_plan is None


def test_a_ring_is_refused(group):
    group(2)
    transformer, _ = with_processor()
    transformer.enable_parallelism(config=ContextParallelConfig(ring_degree=2))
    with pytest.raises(NotImplementedError, match=r"ring attention .* ring_degree=2: blocks are"):
        run(transformer)


def test_tokens_that_diffusers_does_not_split_evenly_are_refused_with_the_way(group):
    group(2)
    transformer, _ = with_processor()
    transformer.enable_parallelism(config=ContextParallelConfig(ulysses_degree=2))
    with pytest.raises(ValueError, match=r"75 video tokens .* 2 ranks; .*ulysses_anything=True"):
        run(transformer, size=10)


def test_another_split_of_the_tokens_is_refused(group):
    group(2)
    transformer, _ = with_processor()
    rows = HUNYUAN_VIDEO_PLAN["transformer_blocks.0"]["hidden_states"]
    both = {"hidden_states": rows, "encoder_hidden_states": rows}
    transformer.enable_parallelism(
        config=ContextParallelConfig(ulysses_degree=2),
        cp_plan=HUNYUAN_VIDEO_PLAN | {"transformer_blocks.0": both},
    )
    with pytest.raises(ValueError, match=r"all 16 text tokens with 2 heads, got 32 tokens with"):
        run(transformer)


def test_gradients_are_refused(group):
    group(2)
    transformer, _ = with_processor()
    enable_context_parallel(transformer)
    inputs = forward_inputs()
    inputs["hidden_states"].requires_grad_()
    with pytest.raises(NotImplementedError, match=r"run within torch\.no_grad"):
        transformer(**inputs)


def test_a_cache_that_ranks_would_decide_differently_is_refused(group):
    group(2)
    transformer, _ = with_processor()
    enable_context_parallel(transformer)
    transformer.enable_cache(FirstBlockCacheConfig())
    with pytest.raises(NotImplementedError, match=r"FirstBlockCacheConfig.*disable_cache\(\)"):
        run(transformer)


def test_replaced_tokens_of_the_first_frame_are_refused(group):
    group(2)
    transformer = tiny_transformer(image_condition_type="token_replace")
    with pytest.raises(UnsupportedModelError, match=r"token_replace.* first frame"):
        enable_context_parallel(transformer)


def test_what_has_no_transformer_is_refused():
    with pytest.raises(UnsupportedModelError, match="does not support Linear"):
        enable_context_parallel(torch.nn.Linear(2, 2))
