"""A tiny HunyuanVideo with random weights: transformer, pipeline of latents, whole pipeline.

The grid of 64x64x9 pixels is 3 x 4 x 4 = 48 video tokens: 6 blocks of 8, and 2 of text.
"""

from pathlib import Path

import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideoPipeline,
    HunyuanVideoTransformer3DModel,
)

from benchmarks.random_pipeline import PipelineSizes, random_pipeline
from xattn_video import XAttnProcessor

CHANNELS, FRAMES, SIZE = 4, 9, 64
HEADS, HEAD_DIM, NUM_LAYERS = 2, 16, 4
TEXT_TOKENS, TEXT_DIM, POOLED_DIM = 16, 32, 24
VIDEO_TOKENS = 48
TINY_TRANSFORMER = {
    "in_channels": CHANNELS,
    "out_channels": CHANNELS,
    "num_attention_heads": HEADS,
    "attention_head_dim": HEAD_DIM,
    "num_layers": 2,
    "num_single_layers": 2,
    "num_refiner_layers": 1,
    "mlp_ratio": 2.0,
    "text_embed_dim": TEXT_DIM,
    "pooled_projection_dim": POOLED_DIM,
    "rope_axes_dim": (4, 6, 6),
}
# The vocabularies are those of the demo model's tokenizers.
TINY_PIPELINE = PipelineSizes(
    transformer=TINY_TRANSFORMER | {"num_layers": 1},
    vae={
        "latent_channels": CHANNELS,
        "block_out_channels": (8, 8, 8, 8),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "mid_block_add_attention": False,
    },
    text_encoder={
        "vocab_size": 538,
        "hidden_size": TEXT_DIM,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "max_position_embeddings": 512,
    },
    text_encoder_2={
        "vocab_size": 613,
        "hidden_size": POOLED_DIM,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    },
)


def tiny_transformer(**config) -> HunyuanVideoTransformer3DModel:
    """Two double-stream, two single-stream blocks and one refiner block, the same every time."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        transformer = HunyuanVideoTransformer3DModel(**(TINY_TRANSFORMER | config))
        # Peaky enough for blocks to differ: PyTorch's own initialisation attends evenly.
        for name, weight in transformer.named_parameters():
            if "norm_q" in name or "norm_k" in name or "norm_added" in name:
                weight.data.fill_(3.0)
    return transformer.eval().requires_grad_(False)


def tiny_pipeline(transformer=None) -> HunyuanVideoPipeline:
    """A pipeline without text encoders and VAE: give it `prompt`, take its latents."""
    pipe = HunyuanVideoPipeline(
        text_encoder=None,
        tokenizer=None,
        transformer=tiny_transformer() if transformer is None else transformer,
        vae=None,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
        text_encoder_2=None,
        tokenizer_2=None,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def save_whole_pipeline(folder: Path) -> None:
    """Write a pipeline with text encoders and VAE, as `from_pretrained` reads it."""
    torch.manual_seed(0)
    random_pipeline(TINY_PIPELINE, torch.device("cpu")).save_pretrained(folder)


def prompt(lengths=(10,), seed=0, prefix="") -> dict[str, torch.Tensor]:
    """Embedded prompts of the given valid lengths, padded at the right, as pipeline arguments."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.arange(TEXT_TOKENS) < torch.tensor(lengths)[:, None]
    return {
        f"{prefix}prompt_embeds": torch.randn(
            len(lengths), TEXT_TOKENS, TEXT_DIM, generator=generator
        ),
        f"{prefix}pooled_prompt_embeds": torch.randn(
            len(lengths), POOLED_DIM, generator=generator
        ),
        f"{prefix}prompt_attention_mask": mask.long(),
    }


def generate(pipe, num_steps=4, seed=0, lengths=(10,), **options) -> torch.Tensor:
    """Run the pipeline; its latents, `[B, C, T, H, W]`."""
    arguments = {
        "height": SIZE,
        "width": SIZE,
        "num_frames": FRAMES,
        "num_inference_steps": num_steps,
        "generator": torch.Generator().manual_seed(seed),
        "output_type": "latent",
    }
    return pipe(**(arguments | prompt(lengths) | options)).frames


def forward_inputs(timestep=500.0, lengths=(10,), seed=0, size=8, dtype=torch.float32) -> dict:
    """The arguments of one forward pass of the transformer."""
    generator = torch.Generator().manual_seed(seed)
    text = prompt(lengths)
    batch = len(lengths)
    return {
        "hidden_states": torch.randn(batch, CHANNELS, 3, size, size, generator=generator).to(
            dtype
        ),
        "timestep": torch.full((batch,), timestep),
        "encoder_hidden_states": text["prompt_embeds"].to(dtype),
        "encoder_attention_mask": text["prompt_attention_mask"],
        "pooled_projections": text["pooled_prompt_embeds"].to(dtype),
        "guidance": torch.full((batch,), 6000.0, dtype=dtype),
    }


def tiny_processor(threshold=0.5, **options) -> XAttnProcessor:
    """A processor whose blocks suit the tiny grid; dense for two steps."""
    defaults = {"stride": 4, "block_size": 8, "warmup_steps": 2, "min_tokens": 0}
    return XAttnProcessor(threshold, **(defaults | options))


def states(report) -> list[str]:
    """What the layers of each forward pass did: one word where they agree."""
    words = []
    for forward in report.forwards:
        found = {run.state for run in forward.layers}
        words.append(found.pop() if len(found) == 1 else "mixed")
    return words


def run(transformer, **options):
    """One forward pass without gradients."""
    with torch.no_grad():
        return transformer(**forward_inputs(**options)).sample


def with_processor(threshold=0.5, model=None, **options):
    """A transformer and the processor that was set on it; sparse from step 0."""
    transformer = tiny_transformer() if model is None else model
    processor = tiny_processor(threshold, **({"warmup_steps": 0} | options))
    transformer.set_attn_processor(processor)
    return transformer, processor
