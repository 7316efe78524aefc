"""What docs/recipes shows works, and holds for real adapters, casts and caches."""

import json
import re
import shlex
from pathlib import Path

import pytest
import torch
from command_line import SMALL, run_cli
from diffusers import (
    FirstBlockCacheConfig,
    HunyuanVideoPipeline,
    PyramidAttentionBroadcastConfig,
)
from hunyuan import (
    NUM_LAYERS,
    forward_inputs,
    generate,
    states,
    tiny_pipeline,
    tiny_processor,
    tiny_transformer,
    with_processor,
)
from page_code import HUB_ID, NUM_STEPS, blocks_of, run_snippets
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict

from xattn_video.processors import engine

FOLDER = Path(__file__).parents[1] / "docs/recipes"
WARM_THEN_SPARSE = ["dense"] * 5 + ["sparse"] * (NUM_STEPS - 5)
PROJECTIONS = ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj"]


def save_adapter(pipe, folder):
    """Write a LoRA for every projection of the transformer's attention, as training does."""
    transformer = pipe.transformer
    transformer.add_adapter(LoraConfig(r=4, lora_alpha=4, target_modules=PROJECTIONS), "trained")
    layers = get_peft_model_state_dict(transformer, adapter_name="trained")
    generator = torch.Generator().manual_seed(0)
    layers = {
        name: 0.3 * torch.randn(weight.shape, generator=generator, dtype=weight.dtype)
        for name, weight in layers.items()
    }
    HunyuanVideoPipeline.save_lora_weights(folder, transformer_lora_layers=layers)


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """A LoRA for the tiny pipeline of latents."""
    folder = tmp_path_factory.mktemp("adapter")
    save_adapter(tiny_pipeline(), folder)
    return folder


def cast(pipe):
    pipe.transformer.enable_layerwise_casting(torch.float8_e4m3fn, torch.bfloat16)


def offload_groups(pipe):
    pipe.transformer.enable_group_offload(
        onload_device=torch.device("cpu"), offload_type="leaf_level"
    )


# The pages.


@pytest.mark.parametrize("name", ["small_cards", "fp8", "first_block_cache"])
def test_the_snippets_of_a_page_run(name, tiny_hub):
    names = run_snippets(FOLDER / f"{name}.md")
    report = names["handle"].processor.report()
    assert report.steps == tuple(range(NUM_STEPS))
    assert report.dense_reasons.keys() == {"warm-up"}
    first_layer = [forward.layers[0].state for forward in report.forwards]
    assert first_layer == WARM_THEN_SPARSE
    assert len(names["video"]) == 9


def test_the_snippets_of_the_adapters_run_and_the_command_line_takes_what_they_save(
    tiny_hub, tmp_path, monkeypatch
):
    save_adapter(HunyuanVideoPipeline.from_pretrained(HUB_ID, dtype=torch.bfloat16), tmp_path)
    load = HunyuanVideoPipeline.load_lora_weights

    def load_lora_weights(self, name, **options):
        assert name == "path/or/hub-id-of-your-lora"
        load(self, tmp_path, **options)

    monkeypatch.setattr(HunyuanVideoPipeline, "load_lora_weights", load_lora_weights)
    names = run_snippets(FOLDER / "lora.md")
    assert names["video"] != names["weaker"] != names["plain"]
    assert not hasattr(names["pipe"].transformer, "peft_config")
    (command,) = [
        shlex.split(line)
        for code in blocks_of("bash", FOLDER / "lora.md")
        for line in code.splitlines()
    ]
    assert command[:2] == ["xattn-video", "generate"]
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    code, _, err = run_cli(*command[1:], *SMALL, "--warmup-steps=2", "--report=run.json")
    assert code == 0, err
    assert json.loads(Path("run.json").read_text())["model"] == "hunyuan-video-style"


@pytest.mark.parametrize("page", sorted(FOLDER.glob("*.md")), ids=lambda page: page.stem)
def test_the_commands_of_a_page_have_the_options(page):
    lines = [line for code in blocks_of("bash", page) for line in code.splitlines()]
    inline = re.findall(r"`(xattn-video [^`]*)`", page.read_text(encoding="utf-8"))
    for words in map(shlex.split, lines + inline):
        code, out, _ = run_cli(words[1], "--help")
        assert code == 0
        for option in words[2:]:
            assert not option.startswith("--") or option in out


# Adapters.


@pytest.mark.parametrize("set_first", [True, False])
def test_a_dense_step_with_an_adapter_is_the_stock_one(adapter, set_first):
    stock, pipe = tiny_pipeline(), tiny_pipeline()
    plain = generate(stock)
    stock.load_lora_weights(adapter, adapter_name="style")
    expected = generate(stock)
    assert (expected - plain).abs().max() > 0.1
    if set_first:
        pipe.transformer.set_attn_processor(tiny_processor(1.0))
    pipe.load_lora_weights(adapter, adapter_name="style")
    if not set_first:
        pipe.transformer.set_attn_processor(tiny_processor(1.0))
    torch.testing.assert_close(generate(pipe), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("change", ["weight", "scale", "disabled", "nothing"])
def test_another_scale_in_the_middle_of_a_generation_drops_the_residual(adapter, change):
    pipe = tiny_pipeline()
    pipe.load_lora_weights(adapter, adapter_name="style")
    transformer, processor = with_processor(None, pipe.transformer, density=0.2, refresh_every=5)
    inputs = forward_inputs(timestep=500.0)
    with torch.no_grad():
        for timestep in (500.0, 400.0, 300.0, 200.0):
            inputs["timestep"] = torch.tensor([timestep])
            if timestep == 300.0 and change == "weight":
                transformer.set_adapters(["style"], [0.5])
            if timestep == 300.0 and change == "disabled":
                transformer.disable_adapters()
            if timestep == 300.0 and change == "scale":
                inputs["attention_kwargs"] = {"scale": 0.5}
            transformer(**inputs)
    expected = (0,) if change == "nothing" else (0, 2)
    assert processor.report().refresh_steps == expected


def test_sparse_blocks_are_those_of_the_adapter_at_every_scale(adapter):
    """Whether it is loaded, scaled, fused or taken away between videos."""
    pipe = tiny_pipeline()
    processor = tiny_processor(0.5)
    pipe.transformer.set_attn_processor(processor)
    plain = generate(pipe)
    pipe.load_lora_weights(adapter, adapter_name="style")
    pipe.set_adapters(["style"], [0.5])
    half = generate(pipe)
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    torch.testing.assert_close(generate(pipe), half, atol=1e-4, rtol=1e-4)
    assert (half - plain).abs().max() > 0.1
    pipe.load_lora_weights(adapter, adapter_name="style")
    pipe.disable_lora()
    assert states(processor.report()) == ["dense", "dense", "sparse", "sparse"]


# 8-bit weights.


@pytest.mark.parametrize("set_first", [True, False])
@pytest.mark.parametrize("threshold", [1.0, 0.5])
def test_casting_leaves_dense_steps_the_stock_ones_and_sparse_ones_sparse(threshold, set_first):
    pipe, stock = (tiny_pipeline(tiny_transformer().to(torch.bfloat16)) for _ in range(2))
    cast(stock)
    processor = tiny_processor(threshold)
    if set_first:
        pipe.transformer.set_attn_processor(processor)
    cast(pipe)
    if not set_first:
        pipe.transformer.set_attn_processor(processor)
    assert pipe.transformer.transformer_blocks[0].attn.to_q.weight.dtype == torch.float8_e4m3fn
    found, expected = generate(pipe), generate(stock)
    if threshold == 1:
        torch.testing.assert_close(found, expected, atol=0.02, rtol=0.02)
    else:
        assert states(processor.report()) == ["dense", "dense", "sparse", "sparse"]
        assert 0.01 < (found - expected).norm() / expected.norm() < 0.5


@pytest.mark.parametrize("set_first", [True, False])
def test_casting_goes_with_group_offloading(set_first):
    pipes = [tiny_pipeline(tiny_transformer().to(torch.bfloat16)) for _ in range(2)]
    found = []
    for pipe, offloads in zip(pipes, (False, True), strict=True):
        if set_first:
            pipe.transformer.set_attn_processor(tiny_processor(0.5))
        cast(pipe)
        if offloads:
            offload_groups(pipe)
        if not set_first:
            pipe.transformer.set_attn_processor(tiny_processor(0.5))
        found.append(generate(pipe))
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("accelerate", [cast, offload_groups])
def test_an_adapter_goes_with_casting_and_offloading(adapter, accelerate):
    pipe = tiny_pipeline(tiny_transformer().to(torch.bfloat16))
    processor = tiny_processor(0.5)
    pipe.transformer.set_attn_processor(processor)
    pipe.load_lora_weights(adapter, adapter_name="style")
    accelerate(pipe)
    assert generate(pipe).isfinite().all()
    assert states(processor.report()) == ["dense", "dense", "sparse", "sparse"]


# Caches.


def test_a_cache_that_never_skips_changes_nothing():
    pipe = tiny_pipeline()
    pipe.transformer.set_attn_processor(tiny_processor(0.5))
    expected = generate(pipe)
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.0))
    torch.testing.assert_close(generate(pipe), expected)
    pipe.transformer.disable_cache()
    torch.testing.assert_close(generate(pipe), expected)


@pytest.mark.parametrize("set_first", [True, False])
def test_a_cache_skips_blocks_of_sparse_steps_in_either_order(set_first):
    pipe = tiny_pipeline()
    processor = tiny_processor(0.5)
    if set_first:
        pipe.transformer.set_attn_processor(processor)
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.2))
    if not set_first:
        pipe.transformer.set_attn_processor(processor)
    for _ in range(2):
        assert generate(pipe, 12).isfinite().all()
        first, *others = zip(*(one.layers for one in processor.report().forwards), strict=True)
        assert [run.state for run in first] == ["dense"] * 2 + ["sparse"] * 10
        found = {run.state for layer in others for run in layer}
        assert found == {"dense", "sparse", "skipped"}


def test_a_layer_that_a_cache_skips_at_its_first_refresh_refreshes_when_it_next_runs():
    pipe = tiny_pipeline()
    processor = tiny_processor(density=0.4, threshold=None, refresh_every=4)
    pipe.transformer.set_attn_processor(processor)
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.3))
    assert generate(pipe, 12).isfinite().all()
    first, *others = zip(*(one.layers for one in processor.report().forwards), strict=True)
    # The last step of the warm-up.
    assert first[1].refreshed
    for layer in others:
        assert [run.state for run in layer[:3]] == ["dense", "skipped", "skipped"]
        assert next(run for run in layer[1:] if run.state != "skipped").refreshed


@pytest.mark.parametrize("options", [{"refresh_every": 3}, {"mask_every": 3}], ids=str)
def test_what_was_due_while_a_cache_skipped_the_layer_is_made_at_its_next_run(
    options, monkeypatch
):
    """The cache runs every second step, so it skips the layers at the choice of step 3."""
    pipe, chosen = tiny_pipeline(), []
    processor = tiny_processor(density=0.4, threshold=None, **{"warmup_steps": 0} | options)
    pipe.transformer.set_attn_processor(processor)
    pipe.transformer.enable_cache(
        PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=2,
            spatial_attention_timestep_skip_range=(0, 1001),
            current_timestep_callback=lambda: pipe.current_timestep,
        )
    )
    select = engine.select_block_lists
    monkeypatch.setattr(
        engine,
        "select_block_lists",
        lambda *given: chosen.append(processor.step_index) or select(*given),
    )
    assert generate(pipe, 8).isfinite().all()
    assert states(processor.report()) == ["sparse", "skipped"] * 4
    assert chosen == [step for step in (0, 4, 6) for _ in range(NUM_LAYERS)]
    if "refresh_every" in options:
        assert processor.report().refresh_steps == (0, 4, 6)
