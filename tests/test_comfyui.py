"""The ComfyUI nodes: against ComfyUI's interface here, and against its own models where it is.

The second part needs ComfyUI's folder on PYTHONPATH; without it, it is skipped.
"""

import functools
import importlib
import logging
import sys
from copy import deepcopy
from dataclasses import fields
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

from integrations import comfyui
from integrations.comfyui.sparse_attention import XAttentionNode, parse_blocks, step_of

HEADS, SIZE = 2, 16
# As ComfyUI's HunyuanVideo: [B, C, T, H, W] in patches of (1, 2, 2), 4 * 8 * 8 = 256 tokens.
LATENTS = (1, 4, 4, 16, 16)
TEXT, VIDEO = 20, 256
SIGMAS = torch.tensor([1.0, 0.9, 0.7, 0.4, 0.0])
DEFAULTS = {
    "threshold": 0.5,
    "start_percent": 0.2,
    "end_percent": 1.0,
    "dense_blocks": "",
    "min_tokens": 0,
    "backend": "torch_gather",
    "stride": 8,
}


def attention(q, k, v, heads, mask=None, skip_reshape=False, skip_output_reshape=False, **kwargs):
    """ComfyUI's call: the override of the options, if there is one, else dense attention."""
    options = kwargs.get("transformer_options") or {}
    override = options.get("optimized_attention_override")
    if override is not None and "_inside_attn_wrapper" not in kwargs:
        inside = kwargs | {"_inside_attn_wrapper": True, "mask": mask}
        inside |= {"skip_reshape": skip_reshape, "skip_output_reshape": skip_output_reshape}
        return override(attention, q, k, v, heads, **inside)
    triple = [
        x if skip_reshape else x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v)
    ]
    mask = mask if mask is None or mask.dim() == 4 else mask[:, None]
    output = scaled_dot_product_attention(*triple, attn_mask=mask)
    return output if skip_output_reshape else output.transpose(1, 2).flatten(2)


class HunyuanVideo(nn.Module):
    """Its attention alone: a text refiner, two double blocks, one single block."""

    patch_size = (1, 2, 2)

    def __init__(self, flipped=False):
        super().__init__()
        self.double_blocks = nn.ModuleList([nn.Module(), nn.Module()])
        if flipped:
            for block in self.double_blocks:
                block.flipped_img_txt = True

    def forward(self, x, timestep, context, triple, mask=None, transformer_options=None):
        options = dict(transformer_options)
        text = [part[:, :, :TEXT] for part in triple]
        attention(*text, HEADS, skip_reshape=True, transformer_options=options)
        outputs = []
        for kind, count in (("double", 2), ("single", 1)):
            options["block_type"] = kind
            for options["block_index"] in range(count):
                call = {"skip_reshape": True, "mask": mask, "transformer_options": options}
                outputs.append(attention(*triple, HEADS, **call))
        return outputs


class WanModel(nn.Module):
    """Its attention alone: self-attention and cross-attention of one block."""

    patch_size = (1, 2, 2)

    def forward(self, x, timestep, context, triple, mask=None, transformer_options=None):
        options = transformer_options
        options["block_type"], options["block_index"] = "double", 0
        q, k, v = (part.transpose(1, 2).flatten(2) for part in triple)
        seen = attention(q, k, v, heads=HEADS, transformer_options=options)
        crossed = attention(q, k[:, :7], v[:, :7], heads=HEADS, transformer_options=options)
        return [seen, crossed]


class Patcher:
    """ComfyUI's ModelPatcher, as far as the node sees it."""

    def __init__(self, model):
        self.model, self.model_options, self.wrappers = model, {"transformer_options": {}}, []

    def get_model_object(self, name):
        # The flow's own schedule without a shift: half of the steps have a sigma above 0.5.
        sampling = SimpleNamespace(percent_to_sigma=lambda percent: 1.0 - percent)
        return {"diffusion_model": self.model, "model_sampling": sampling}[name]

    def clone(self):
        copy = Patcher(self.model)
        copy.model_options = {
            "transformer_options": dict(self.model_options["transformer_options"])
        }
        copy.wrappers = list(self.wrappers)
        return copy

    def add_wrapper_with_key(self, kind, key, wrapper):
        assert (kind, key) == ("diffusion_model", "xattn_video")
        self.wrappers.append(wrapper)

    def run(self, triple, step, mask=None):
        options = self.model_options["transformer_options"] | {
            "sigmas": SIGMAS[step : step + 1],
            "sample_sigmas": SIGMAS,
        }
        call = functools.partial(self.model.forward)
        for wrapper in self.wrappers:
            executor = functools.partial(call)
            executor.class_obj = self.model
            call = functools.partial(wrapper, executor)
        latents = torch.zeros(LATENTS)
        return call(latents, SIGMAS[step], None, triple, mask, options)


@pytest.fixture
def triple():
    """Text first, then video, as ComfyUI has them."""
    torch.manual_seed(0)
    return [3 * torch.randn(1, HEADS, TEXT + VIDEO, SIZE) for _ in range(3)]


def patch(model, **changes):
    return XAttentionNode().patch(Patcher(model), **DEFAULTS | changes)[0]


def same(outputs, others):
    return [torch.allclose(a, b, atol=1e-5) for a, b in zip(outputs, others, strict=True)]


def test_steps_are_sparse_between_the_two_shares(triple):
    plain, patched = Patcher(HunyuanVideo()), patch(HunyuanVideo(), end_percent=0.5)
    equal = [same(plain.run(triple, i), patched.run(triple, i)) for i in range(4)]
    # Sigmas 1 and 0.9 come before 20% of the way, 0.4 after half of it.
    assert equal == [[True] * 3, [True] * 3, [False] * 3, [True] * 3]
    assert patched.model_options is not plain.model_options


def test_a_threshold_of_one_is_dense_attention_wherever_the_text_stands(triple):
    for flipped in (False, True):
        model = HunyuanVideo(flipped)
        parts = triple
        if flipped:
            parts = [torch.cat((x[:, :, TEXT:], x[:, :, :TEXT]), dim=2) for x in triple]
        patched = patch(model, threshold=1.0)
        outputs = patched.run(parts, 2)
        assert same(outputs, Patcher(model).run(parts, 2)) == [True] * 3
        sparse = patch(model).run(parts, 2)[0]
        dense = Patcher(model).run(parts, 2)[0]
        text = slice(VIDEO, None) if flipped else slice(0, TEXT)
        # Rows of text compute every block, at their right places.
        assert torch.allclose(sparse[:, text], dense[:, text], atol=1e-5)
        assert not torch.allclose(sparse, dense, atol=1e-3)


def test_padded_text_is_no_key(triple):
    mask = torch.zeros(1, 1, TEXT + VIDEO)
    mask[:, :, 13:TEXT] = torch.finfo(torch.float32).min
    model = HunyuanVideo()
    outputs = patch(model, threshold=1.0).run(triple, 2, mask)
    expected = Patcher(model).run(triple, 2, mask)
    keep = [*range(13), *range(TEXT, TEXT + VIDEO)]
    assert same([o[:, keep] for o in outputs], [e[:, keep] for e in expected]) == [True] * 3


def test_a_mask_that_differs_from_query_to_query_stays_dense(triple):
    mask = torch.zeros(1, 1, TEXT + VIDEO, TEXT + VIDEO)
    mask[..., :10, 30:] = -1e9
    model = HunyuanVideo()
    assert (
        same(patch(model).run(triple, 2, mask), Patcher(model).run(triple, 2, mask)) == [True] * 3
    )


def test_dense_blocks_and_few_tokens_stay_dense(triple):
    plain = Patcher(HunyuanVideo()).run(triple, 2)
    # The single blocks are counted on from the double ones.
    chosen = patch(HunyuanVideo(), dense_blocks="0, 2").run(triple, 2)
    assert same(chosen, plain) == [True, False, True]
    assert same(patch(HunyuanVideo(), min_tokens=VIDEO + 1).run(triple, 2), plain) == [True] * 3
    assert same(patch(HunyuanVideo(), min_tokens=VIDEO).run(triple, 2), plain) == [False] * 3


def test_wan_is_sparse_in_self_attention_alone(triple):
    triple = [part[:, :, TEXT:] for part in triple]
    plain = Patcher(WanModel()).run(triple, 2)
    assert same(patch(WanModel()).run(triple, 2), plain) == [False, True]
    assert same(patch(WanModel(), threshold=1.0).run(triple, 2), plain) == [True, True]


def test_another_nodes_override_computes_the_dense_layers(triple):
    calls = []

    def other(function, *args, **kwargs):
        calls.append(args[0].shape[2])
        return function(*args, **kwargs)

    before = Patcher(HunyuanVideo())
    before.model_options["transformer_options"]["optimized_attention_override"] = other
    patched = XAttentionNode().patch(before, **DEFAULTS | {"dense_blocks": "1"})[0]
    patched.run(triple, 2)
    assert calls == [TEXT, TEXT + VIDEO]


def test_verbose_tells_each_step(triple, caplog):
    patched = patch(HunyuanVideo(), verbose=True)
    with caplog.at_level(logging.INFO, "xattn_video.comfyui"):
        patched.run(triple, 0)
        patched.run(triple, 2)
    first, second = [record.getMessage() for record in caplog.records]
    assert first == "step 1/4: dense, 256 video tokens"
    assert second.startswith(
        "step 3/4: 3 layers sparse, 256 video tokens, first layer's density 0."
    )


def test_other_models_and_shares_are_refused():
    with pytest.raises(
        ValueError, match="supports ComfyUI's HunyuanVideo and Wan models, got Linear"
    ):
        patch(nn.Linear(1, 1))
    with pytest.raises(ValueError, match=r"must be below end_percent, got 0\.6 and 0\.5"):
        patch(HunyuanVideo(), start_percent=0.6, end_percent=0.5)
    with pytest.raises(
        ValueError, match="dense_blocks must be numbers such as 0, 1, 57-59, got 'a"
    ):
        patch(HunyuanVideo(), dense_blocks="1, a")


def test_a_second_node_is_refused_and_a_copied_model_keeps_the_first(triple):
    patched = patch(HunyuanVideo())
    with pytest.raises(ValueError, match="already has XAttention"):
        XAttentionNode().patch(patched, **DEFAULTS)
    # Some versions of ComfyUI copy a model's options deeply when a further node takes it.
    patched.model_options = deepcopy(patched.model_options)
    plain = Patcher(HunyuanVideo()).run(triple, 2)
    assert same(patched.run(triple, 2), plain) == [False] * 3


def test_the_inputs_have_comfyuis_names():
    (node,) = comfyui.NODE_CLASS_MAPPINGS.values()
    inputs = node.INPUT_TYPES()["required"]
    assert {"start_percent", "end_percent", "dense_blocks", "min_tokens", "verbose"} <= set(inputs)
    assert set(inputs) == {*DEFAULTS, "model", "verbose"}
    assert inputs["min_tokens"][1]["default"] == 16384
    assert parse_blocks(" 0, 2-4,") == {0, 2, 3, 4}
    assert step_of({"sigmas": torch.tensor([0.69]), "sample_sigmas": SIGMAS}) == (3, 4)


@pytest.fixture(scope="module")
def comfy():
    """ComfyUI itself, on the CPU."""
    pytest.importorskip("comfy.options", reason="ComfyUI is not on PYTHONPATH")
    words, sys.argv = sys.argv, ["comfyui", "--cpu"]
    importlib.import_module("comfy.options").enable_args_parsing()
    names = ("model_patcher", "model_sampling", "ops", "ldm.hunyuan_video.model", "ldm.wan.model")
    modules = {name: importlib.import_module(f"comfy.{name}") for name in names}
    sys.argv = words
    return modules


HUNYUAN = {
    "in_channels": 4, "out_channels": 4, "vec_in_dim": 8, "context_in_dim": 8, "hidden_size": 32,
    "mlp_ratio": 2.0, "num_heads": 2, "depth": 2, "depth_single_blocks": 2, "axes_dim": [4, 6, 6],
    "theta": 256, "patch_size": [1, 2, 2], "qkv_bias": True, "guidance_embed": False,
    "vision_in_dim": None,
}  # fmt: skip


def own_model(comfy, name):
    """A small model of ComfyUI with weights at random."""
    torch.manual_seed(0)
    shared = {
        "dtype": torch.float32,
        "device": "cpu",
        "operations": comfy["ops"].disable_weight_init,
    }
    if name == "HunyuanVideo":
        module = comfy["ldm.hunyuan_video.model"]
        known = [field.name for field in fields(module.HunyuanVideoParams)]
        # What later versions added, such as byt5 and meanflow, is off.
        sizes = {name: HUNYUAN.get(name, False) for name in known}
        model = module.HunyuanVideo(**sizes, **shared)
    else:
        sizes = {
            "in_dim": 4,
            "out_dim": 4,
            "dim": 32,
            "ffn_dim": 64,
            "freq_dim": 16,
            "text_dim": 8,
        }
        model = comfy["ldm.wan.model"].WanModel(**sizes, num_heads=2, num_layers=2, **shared)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


@pytest.mark.parametrize(
    ("name", "padding"), [("HunyuanVideo", 0), ("HunyuanVideo", 7), ("WanModel", 0)]
)
def test_comfyuis_own_model(comfy, name, padding):
    model = own_model(comfy, name)
    whole = nn.Module()
    whole.diffusion_model = model
    whole.model_sampling = comfy["model_sampling"].ModelSamplingDiscreteFlow()
    whole.model_sampling.set_parameters(shift=1.0)
    device = torch.device("cpu")
    patcher = comfy["model_patcher"].ModelPatcher(whole, device, device)
    inputs = {"context": torch.randn(1, TEXT, 8)}
    if name == "HunyuanVideo":
        mask = torch.arange(TEXT)[None] < TEXT - padding
        inputs |= {"y": torch.randn(1, 8), "attention_mask": mask.long() if padding else None}
    latents = torch.randn(LATENTS)

    def run(made, step):
        options = {**made.model_options["transformer_options"], "sample_sigmas": SIGMAS}
        options |= {"sigmas": SIGMAS[step : step + 1], "wrappers": dict(made.wrappers)}
        with torch.inference_mode():
            return model(latents, SIGMAS[step : step + 1], **inputs, transformer_options=options)

    def close(settings, step):
        (made,) = XAttentionNode().patch(patcher, **DEFAULTS | settings)
        return torch.allclose(run(made, step), run(patcher, step), atol=1e-3)

    assert close({"threshold": 1.0}, 2)
    assert not close({"threshold": 0.3}, 2)
    assert close({"threshold": 0.3}, 0)
    assert close({"threshold": 0.3, "dense_blocks": "0-3"}, 2)
    assert close({"threshold": 0.3, "min_tokens": VIDEO + 1}, 2)
