"""The sizes of a model, read from its configuration files and tensor headers only."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from xattn_video.checkpoint_files import read_shapes
from xattn_video.pipelines.source import HUNYUAN_VIDEO, ModelSource, check_supported

# Parameters of HunyuanVideo's Llama and CLIP text encoders, and of its VAE.
_TEXT_PARAMETERS = 7_505_186_816 + 123_060_480
_VAE_PARAMETERS = 246_478_803


@dataclass(frozen=True, slots=True)
class ModelShape:
    """Sizes of a HunyuanVideo pipeline; the defaults are HunyuanVideo's own."""

    heads: int = 24
    head_dim: int = 128
    double_layers: int = 20
    single_layers: int = 40
    refiner_layers: int = 2
    mlp_ratio: float = 4.0
    patch_size: int = 2
    patch_size_t: int = 1
    spatial_compression: int = 8
    temporal_compression: int = 4
    vae_channels: int = 128
    """Channels of the VAE's tensors at the size of the video."""
    text_tokens: int = 256
    text_parameters: int = _TEXT_PARAMETERS
    vae_parameters: int = _VAE_PARAMETERS

    @property
    def hidden(self) -> int:
        return self.heads * self.head_dim

    @property
    def layers(self) -> int:
        return self.double_layers + self.single_layers

    @property
    def linear_parameters(self) -> float:
        """Weights of one layer applied to each token; in double streams, those of one stream."""
        return (4 + 2 * self.mlp_ratio) * self.hidden**2

    @property
    def transformer_parameters(self) -> int:
        """Parameters of the blocks, their modulation and the refiner, without small embedders."""
        single = self.linear_parameters + 3 * self.hidden**2
        double = 2 * (self.linear_parameters + 6 * self.hidden**2)
        refiner = (12 + 2) * self.hidden**2
        return round(
            self.double_layers * double
            + self.single_layers * single
            + self.refiner_layers * refiner
        )

    def grid(self, height: int, width: int, num_frames: int) -> tuple[int, int, int]:
        """T, H and W of the grid of latent patches; each patch is one video token."""
        latent_frames = (num_frames - 1) // self.temporal_compression + 1
        side = self.spatial_compression * self.patch_size
        return latent_frames // self.patch_size_t, height // side, width // side


def read_model_shape(source: ModelSource) -> ModelShape:
    """The shape of a model, without its weights; HunyuanVideo's own needs no file.

    Raises:
        ValueError: The folder lacks a configuration file.
        UnsupportedModelError: The model is not HunyuanVideo.
        PipelineLoadError: The hub has no such model, or cannot be reached.
    """
    if source.name == HUNYUAN_VIDEO and source.folder is None:
        return ModelShape()
    check_supported(source)
    shape = shape_of_configs(
        source.read_json("transformer/config.json"), source.read_json("vae/config.json")
    )
    if source.folder is not None:
        parts = (source.folder / name for name in ("text_encoder", "text_encoder_2"))
        shape = replace(
            shape,
            text_parameters=sum(map(count_parameters, parts)),
            vae_parameters=count_parameters(source.folder / "vae"),
        )
    return shape


def shape_of_configs(transformer: Mapping[str, Any], vae: Mapping[str, Any]) -> ModelShape:
    """The shape that the configurations of a transformer and a VAE describe."""
    default = ModelShape()
    return ModelShape(
        heads=transformer.get("num_attention_heads", default.heads),
        head_dim=transformer.get("attention_head_dim", default.head_dim),
        double_layers=transformer.get("num_layers", default.double_layers),
        single_layers=transformer.get("num_single_layers", default.single_layers),
        refiner_layers=transformer.get("num_refiner_layers", default.refiner_layers),
        mlp_ratio=transformer.get("mlp_ratio", default.mlp_ratio),
        patch_size=transformer.get("patch_size", default.patch_size),
        patch_size_t=transformer.get("patch_size_t", default.patch_size_t),
        spatial_compression=vae.get("spatial_compression_ratio", default.spatial_compression),
        temporal_compression=vae.get("temporal_compression_ratio", default.temporal_compression),
        vae_channels=min(vae.get("block_out_channels", [default.vae_channels])),
    )


def count_parameters(folder: Path) -> int:
    """Elements of all tensors in a folder's safetensors files, from the headers of the files.

    Raises:
        ValueError: A file cannot be read.
    """
    files = folder.glob("*.safetensors")
    return sum(math.prod(shape) for file in files for shape in read_shapes(file).values())
