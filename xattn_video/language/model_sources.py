"""Finds and loads a language model: the demo model, random weights, a folder, the hub, GGUF."""

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from xattn_video.errors import MissingPackageError

DEMO = "demo"
DEMO_FOLDER = Path(__file__).parent / "demo"
"""The folder of the small trained model that ships with the package."""
RANDOM = "random:"
# From the models' own configurations, without what does not affect speed.
_SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-3-8b": (
        "llama",
        {
            "vocab_size": 128256,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
        },
    ),
    "qwen2.5-7b": (
        "qwen2",
        {
            "vocab_size": 152064,
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
        },
    ),
    "smollm2-135m": (
        "llama",
        {
            "vocab_size": 49152,
            "hidden_size": 576,
            "intermediate_size": 1536,
            "num_hidden_layers": 30,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "tie_word_embeddings": True,
        },
    ),
    "tiny": (
        "llama",
        {
            "vocab_size": 128,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
        },
    ),
}


@dataclass(frozen=True, slots=True)
class LanguageSource:
    """Where a language model comes from.

    Attributes:
        name: ``demo``, ``random:`` and a shape, a folder, a hub ID, or a ``.gguf`` file.
        config: The configuration of the model.
    """

    name: str
    config: Any

    @property
    def is_random(self) -> bool:
        """Whether the weights are random, which suffices for time and memory only."""
        return self.name.startswith(RANDOM)

    @property
    def is_demo(self) -> bool:
        """Whether this is the small trained model that ships with the package."""
        return self.name == DEMO

    @property
    def text_config(self) -> Any:
        """The configuration of its text model."""
        return self.config.get_text_config(decoder=True)

    @property
    def context(self) -> int | None:
        """The model's context length in tokens; None if its configuration does not tell."""
        context: int | None = getattr(self.text_config, "max_position_embeddings", None)
        return context

    def count_parameters(self) -> int:
        """The number of parameters; allocates no weights."""
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(self.config)
        return sum(parameter.numel() for parameter in model.parameters())

    def load(self, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
        """The model in evaluation mode, on its device."""
        if self.is_random:
            torch.manual_seed(0)
            with torch.device(device):
                model = AutoModelForCausalLM.from_config(self.config, dtype=dtype)
        else:
            where, options = _where(self.name)
            placed = {} if device.type == "cpu" else {"device_map": {"": device}}
            model = AutoModelForCausalLM.from_pretrained(where, dtype=dtype, **options, **placed)
        return model.eval()

    def load_tokenizer(self) -> Any:
        """The tokenizer.

        Raises:
            ValueError: The model has no readable tokenizer.
        """
        where, options = _where(self.name)
        try:
            return AutoTokenizer.from_pretrained(where, **options)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"{self.name!r} has no tokenizer that can be read: {_first_line(error)}"
            ) from None


def find_language_model(name: str, max_tokens: int) -> LanguageSource:
    """Read the configuration of a model.

    Args:
        name: As in `LanguageSource`.
        max_tokens: The context length to give a model with random weights.

    Raises:
        ValueError: There is no such model, or it is not a causal language model.
        FileNotFoundError: The demo model's files are missing from the installation.
        MissingPackageError: The model is a GGUF file and the package gguf is not installed.
    """
    if name.startswith(RANDOM):
        kind, shape = _shape(name.removeprefix(RANDOM))
        config = AutoConfig.for_model(kind, **shape, max_position_embeddings=max_tokens)
        return LanguageSource(name, config)
    where, options = _where(name)
    try:
        config = AutoConfig.from_pretrained(where, **options)
    except (OSError, ValueError, KeyError) as error:
        if Path(where).is_dir():
            raise ValueError(f"{name!r} cannot be read: {_first_line(error)}") from None
        raise ValueError(
            f"{name!r} is no folder of a model, no .gguf file, not {DEMO!r}, no {RANDOM}SHAPE, "
            f"and the hub does not give it: {_first_line(error)}"
        ) from None
    if type(config) not in AutoModelForCausalLM._model_mapping:
        raise ValueError(
            f"{name!r} is a {config.model_type} model, which does not continue text by itself; "
            "use a causal language model, such as Llama or Qwen2.5."
        )
    return LanguageSource(name, config)


def _shape(name: str) -> tuple[str, dict[str, Any]]:
    if name not in _SHAPES:
        raise ValueError(
            f"no shape is called {name!r}; use {RANDOM} and one of {', '.join(_SHAPES)}."
        )
    return _SHAPES[name]


def _where(name: str) -> tuple[str, dict[str, Any]]:
    """The folder or hub ID, and transformers' keyword arguments to read it."""
    if name == DEMO:
        if not (DEMO_FOLDER / "config.json").is_file():
            raise FileNotFoundError(
                f"the demo language model's files are missing, expected "
                f"{DEMO_FOLDER / 'config.json'}; reinstall xattn-video, or train the model with "
                "scripts/train_language_model.py."
            )
        return str(DEMO_FOLDER), {"local_files_only": True}
    path = Path(name)
    if path.suffix != ".gguf":
        if path.is_dir() and not (path / "config.json").is_file():
            raise ValueError(
                f"the folder {name!r} has no config.json; give a folder that save_pretrained "
                "wrote, or a .gguf file in it."
            )
        return name, {}
    if not path.is_file():
        raise ValueError(f"there is no file {name!r}; give the path of a .gguf file.")
    if find_spec("gguf") is None:
        raise MissingPackageError(
            f"{name!r} needs the package gguf, which is not installed; pip install gguf."
        )
    return str(path.parent), {"gguf_file": path.name}


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
