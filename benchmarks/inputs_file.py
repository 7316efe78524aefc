"""A file of queries, keys and values that a model computed: safetensors, `[B, S, H, D]`."""

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from xattn_video.files import atomic_path
from xattn_video.measure.attention_problems import AttentionTensors

_PARTS = ("query", "key", "value")
_NUM_TEXT_TOKENS = "num_text_tokens"


def save_inputs(
    path: Path, captures: dict[str, tuple[Tensor, Tensor, Tensor]], num_text_tokens: int
) -> None:
    """Write {name: (query, key, value)}, each `[B, S, H, D]`, all tokens valid, the text last."""
    tensors = {
        f"{name}/{part}": tensor.contiguous().cpu()
        for name, capture in captures.items()
        for part, tensor in zip(_PARTS, capture, strict=True)
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary:
        try:
            save_file(tensors, temporary, {_NUM_TEXT_TOKENS: str(num_text_tokens)})
        except SafetensorError as error:
            raise OSError(str(error)) from None


def input_names(path: Path) -> list[str]:
    """The names of the captures in a file."""
    with safe_open(path, framework="pt") as file:
        return sorted({key.rpartition("/")[0] for key in file.keys()})  # noqa: SIM118


def load_inputs(
    path: Path, name: str, device: torch.device, dtype: torch.dtype
) -> AttentionTensors:
    """One capture, as `[B, H, S, D]` without a copy."""
    with safe_open(path, framework="pt") as file:
        query, key, value = (
            file.get_tensor(f"{name}/{part}").to(device, dtype).transpose(1, 2) for part in _PARTS
        )
        num_text_tokens = int(file.metadata()[_NUM_TEXT_TOKENS])
    return AttentionTensors(name, query, key, value, num_text_tokens, from_model=True)
