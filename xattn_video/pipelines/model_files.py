"""Checks that the files of a model's folder are present, complete and from one model."""

from pathlib import Path
from typing import Any

from xattn_video.checkpoint_files import (
    DOWNLOAD_AGAIN,
    check_content,
    check_weights,
    read_json,
    weight_files,
)

# Part -> its configuration file, the key that tells its kind, and the allowed kinds.
_CONFIGS: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "transformer": ("config.json", "_class_name", ("HunyuanVideoTransformer3DModel",)),
    "vae": ("config.json", "_class_name", ("AutoencoderKLHunyuanVideo",)),
    "text_encoder": ("config.json", "model_type", ("llama",)),
    "text_encoder_2": ("config.json", "model_type", ("clip_text_model", "clip")),
    "scheduler": ("scheduler_config.json", "_class_name", ()),
}
# Part -> file names of its weights; the first that exists is read.
_DIFFUSERS_WEIGHTS = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")
_TRANSFORMERS_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
_WEIGHTS = {
    "transformer": _DIFFUSERS_WEIGHTS,
    "vae": _DIFFUSERS_WEIGHTS,
    "text_encoder": _TRANSFORMERS_WEIGHTS,
    "text_encoder_2": _TRANSFORMERS_WEIGHTS,
}
_TOKENIZERS = ("tokenizer", "tokenizer_2")
_VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json")
# Keys that must agree between two parts.
_SHARED_SIZES = (
    ("transformer", "in_channels", "vae", "latent_channels"),
    ("transformer", "text_embed_dim", "text_encoder", "hidden_size"),
    ("transformer", "pooled_projection_dim", "text_encoder_2", "hidden_size"),
)


def check_model_files(folder: Path) -> None:
    """Check that a HunyuanVideo pipeline can be loaded from a folder, without reading weights.

    Raises:
        ValueError: A file is missing, empty, cut short, a git-LFS pointer or not valid JSON, or
            the parts do not belong to one HunyuanVideo pipeline.
    """
    try:
        _check_parts(folder)
    except FileNotFoundError as error:
        raise ValueError(
            f"{error.filename} is missing from the model; {DOWNLOAD_AGAIN}."
        ) from None


def _check_parts(folder: Path) -> None:
    index = read_json(folder / "model_index.json")
    for part in (*_CONFIGS, *_TOKENIZERS):
        if not isinstance(index.get(part), list) or None in index[part]:
            raise ValueError(
                f"{folder / 'model_index.json'} names no {part}, got {index.get(part)!r}; give a "
                "folder that holds all parts of a HunyuanVideoPipeline."
            )
    configs = {part: _read_config(folder, part) for part in _CONFIGS}
    _check_shared_sizes(folder, configs)
    for part in _TOKENIZERS:
        _check_tokenizer(folder / part)
    for part, names in _WEIGHTS.items():
        shapes: dict[str, list[int]] = {}
        for file, promised in weight_files(folder / part, names).items():
            shapes |= check_weights(file, promised)
        # Quantised weights have other shapes; pickled weights were not read.
        if shapes and "quantization_config" not in configs[part]:
            _check_shapes(folder / part, configs[part], shapes)


def _read_config(folder: Path, part: str) -> dict[str, Any]:
    """A part's configuration; raises ValueError if it is of another kind."""
    name, key, expected = _CONFIGS[part]
    config = read_json(folder / part / name)
    if expected and config.get(key) not in expected:
        raise ValueError(
            f"{folder / part / name} belongs to another model: {key} is {config.get(key)!r}, "
            f"expected {' or '.join(map(repr, expected))}; {DOWNLOAD_AGAIN}."
        )
    return config


def _check_shared_sizes(folder: Path, configs: dict[str, dict[str, Any]]) -> None:
    for ours, our_key, theirs, their_key in _SHARED_SIZES:
        one, other = configs[ours].get(our_key), configs[theirs].get(their_key)
        if None not in (one, other) and one != other:
            raise ValueError(
                f"{folder / ours} and {folder / theirs} belong to different models: {our_key} is "
                f"{one} and {their_key} is {other}, expected the same; take both from one model."
            )


def _check_tokenizer(folder: Path) -> None:
    read_json(folder / "tokenizer_config.json")
    vocabulary = next((folder / n for n in _VOCABULARIES if (folder / n).exists()), None)
    if vocabulary is None:
        raise ValueError(
            f"{folder} lacks a vocabulary, {' or '.join(_VOCABULARIES)}; {DOWNLOAD_AGAIN}."
        )
    if vocabulary.suffix == ".json":
        read_json(vocabulary)
    else:
        check_content(vocabulary)
    if vocabulary.name == "vocab.json":
        check_content(folder / "merges.txt")


def _check_shapes(folder: Path, config: dict[str, Any], shapes: dict[str, list[int]]) -> None:
    """Raise ValueError on missing weights, which Diffusers would fill with random numbers."""
    import diffusers
    import torch

    if config.get("_class_name") is None:  # a transformers model
        return
    with torch.device("meta"):
        model = getattr(diffusers, config["_class_name"]).from_config(config)
    for name, tensor in model.state_dict().items():
        if shapes.get(name) != list(tensor.shape):
            raise ValueError(
                f"the weights in {folder} do not fit its config.json: {name} is "
                f"{shapes.get(name, 'missing')}, expected {list(tensor.shape)}; take both from "
                "one model."
            )
