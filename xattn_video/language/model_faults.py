"""Finds what is wrong with a language model's folder, and says it in one line with a remedy."""

import re
from collections.abc import Mapping
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch
from transformers import CONFIG_MAPPING, PreTrainedModel
from transformers import __version__ as _version

from xattn_video.checkpoint_files import (
    DOWNLOAD_AGAIN,
    check_weights,
    read_json,
    weight_files,
)

_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")
_LONGEST_FAULT = 200
# Some tables of positions have two rows more than the context, for padding.
_SPARE_POSITIONS = 2


def check_weight_files(folder: Path) -> None:
    """Check the weights of a folder by their headers, in the order in which transformers looks.

    Raises:
        ValueError: A file is missing or damaged.
    """
    whole = folder / _WEIGHTS[0]
    files = {whole: []} if whole.exists() else weight_files(folder, _WEIGHTS)
    try:
        for file, promised in files.items():
            check_weights(file, promised)
    except FileNotFoundError as error:
        raise ValueError(
            f"{error.filename} is missing from the model; {DOWNLOAD_AGAIN}."
        ) from None


def check_loaded(name: str, found: Mapping[str, Any]) -> None:
    """Check transformers' account of loading, which fills gaps with random values.

    Raises:
        ValueError: The weights lack tensors of the model, or have others of another shape.
    """
    other = "take both from one model"
    mismatched = sorted(found["mismatched_keys"])
    if mismatched:
        tensor, shape, expected = mismatched[0]
        raise ValueError(
            f"the weights of {name!r} do not fit its config.json: {tensor} is {list(shape)}, "
            f"expected {list(expected)}; {other}."
        )
    missing = sorted(found["missing_keys"])
    if missing:
        raise ValueError(
            f"the weights of {name!r} do not fit its config.json: {len(missing)} tensors are "
            f"missing, such as {missing[0]}; {other}."
        )


def describe_bad_config(folder: Path, error: Exception) -> str:
    """Why transformers makes no configuration of a folder's config.json."""
    file = folder / "config.json"
    kind = read_json(file).get("model_type")
    if not isinstance(kind, str):
        return (
            f"{file} has no model_type, which names the kind of model, got {kind!r}; give a "
            "folder that save_pretrained wrote."
        )
    if kind not in CONFIG_MAPPING:
        return (
            f"{file} has model type {kind!r}, which transformers {_version} does not have; "
            "pip install -U transformers, or use another model."
        )
    return f"{file} does not describe a {kind} model: {one_line(error)}; {DOWNLOAD_AGAIN}."


def check_tokenizer_files(folder: Path) -> None:
    """Raise ValueError if a tokenizer's file in a folder is not what its name says."""
    for name in ("tokenizer_config.json", "tokenizer.json"):
        if (folder / name).exists():
            read_json(folder / name)


def describe_bad_tokenizer(name: str, error: Exception) -> str:
    """Why transformers makes no tokenizer of what a folder or the hub gives."""
    reason, remedy = one_line(error), "download its files again"
    folder = Path(name)
    if folder.is_dir() and not any((folder / file).exists() for file in _TOKENIZERS):
        reason = f"the folder has none of {', '.join(_TOKENIZERS)}"
        remedy = "put them there with the tokenizer's save_pretrained"
    return f"{name!r} has no tokenizer that can be read: {reason}; {remedy}."


def check_vocabulary(name: str, tokenizer: Any, num_embeddings: int) -> None:
    """Raise ValueError if a tokenizer gives tokens that a model has no embedding of.

    Added tokens that no plain text has may lie beyond: some fine-tuned models come so.
    """
    largest = max(tokenizer.vocab_size - 1, *tokenizer("a")["input_ids"])
    if largest >= num_embeddings:
        raise ValueError(
            f"the tokenizer of {name!r} has {largest + 1:,} tokens, but the model has embeddings "
            f"of {num_embeddings:,}; take the tokenizer and the weights from one model."
        )


def has_position_table(model: PreTrainedModel, context: int) -> bool:
    """Whether a model looks its positions up in a table of its context's size, as GPT-2 does."""
    rows = range(context, context + _SPARE_POSITIONS + 1)
    tokens = model.get_input_embeddings()
    learned = (
        module.num_embeddings
        for module in model.modules()
        if isinstance(module, torch.nn.Embedding) and module is not tokens
    )
    fixed = (len(buffer) for buffer in model.buffers() if buffer.ndim == 2)
    return any(number in rows for number in (*learned, *fixed))


def one_line(error: BaseException) -> str:
    """The first sentences of another library's error, on one line of at most 200 characters."""
    first, *others = re.split(r"(?<=[.!?]) ", " ".join(str(error).split()))
    text = shorten(first, _LONGEST_FAULT)
    for sentence in others:
        if len(text) + len(sentence) >= _LONGEST_FAULT:
            break
        text += f" {sentence}"
    return text.rstrip(".") or type(error).__name__
