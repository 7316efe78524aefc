"""Finds and loads a language model: the demo model, random weights, a folder, the hub, GGUF."""

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import HFValidationError, StrictDataclassError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from xattn_video.checkpoint_files import DOWNLOAD_AGAIN, folder_or_file, read_json
from xattn_video.errors import MissingPackageError
from xattn_video.language.model_faults import (
    check_loaded,
    check_tokenizer_files,
    check_vocabulary,
    check_weight_files,
    describe_bad_config,
    describe_bad_tokenizer,
    has_position_table,
    one_line,
)

DEMO = "demo"
DEMO_FOLDER = Path(__file__).parent / "demo"
"""The folder of the small trained model that ships with the package."""
RANDOM = "random:"
_HUB_EXAMPLE = "Qwen/Qwen2.5-7B-Instruct-1M"
# The errors that transformers raises on invalid values in a configuration.
_BAD_VALUES = (
    KeyError,
    RuntimeError,
    StrictDataclassError,
    TypeError,
    ValueError,
    ArithmeticError,
)
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
        return sum(parameter.numel() for parameter in self._without_weights().parameters())

    def ends_with_context(self) -> bool:
        """Whether a table of positions prevents prompts longer than the context."""
        return self.context is not None and has_position_table(
            self._without_weights(), self.context
        )

    def check_files(self) -> None:
        """Check the configuration, and the headers of the weights if the model is a folder.

        Raises:
            ValueError: The configuration describes no model, or a file is missing or damaged.
        """
        self._without_weights()
        folder = self._folder
        if folder is not None and getattr(self.config, "transformers_weights", None) is None:
            check_weight_files(folder)

    def load(self, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
        """The model in evaluation mode, on its device.

        Raises:
            ValueError: The weights are damaged, missing, or not those of the configuration.
        """
        if self.is_random:
            torch.manual_seed(0)
            with torch.device(device):
                model = AutoModelForCausalLM.from_config(self.config, dtype=dtype)
            return model.eval()
        self.check_files()
        where, options = _where(self.name)
        placed = {} if device.type == "cpu" else {"device_map": {"": device}}
        try:
            model, found = AutoModelForCausalLM.from_pretrained(
                where,
                dtype=dtype,
                output_loading_info=True,
                # Told of in `found`, in place of an error that names no tensor.
                ignore_mismatched_sizes=True,
                **options,
                **placed,
            )
        except SafetensorError as error:
            raise ValueError(
                f"the weights of {self.name!r} are damaged: {one_line(error)}; {DOWNLOAD_AGAIN}."
            ) from None
        except OSError as error:
            raise ValueError(
                f"the weights of {self.name!r} cannot be loaded: {one_line(error)}."
            ) from None
        check_loaded(self.name, found)
        return model.eval()

    def load_tokenizer(self) -> Any:
        """The tokenizer.

        Raises:
            ValueError: The model has no readable tokenizer, or too few embeddings for it.
        """
        where, options = _where(self.name)
        if self._folder is not None:
            check_tokenizer_files(self._folder)
        try:
            tokenizer = AutoTokenizer.from_pretrained(where, **options)
        # The library tokenizers raises nothing narrower on a file of another form.
        except Exception as error:
            raise ValueError(describe_bad_tokenizer(self.name, error)) from None
        check_vocabulary(self.name, tokenizer, self.text_config.vocab_size)
        return tokenizer

    @property
    def _folder(self) -> Path | None:
        """The folder of the model; None for random weights, a hub ID or a GGUF file."""
        if self.is_random:
            return None
        where, options = _where(self.name)
        return Path(where) if "gguf_file" not in options and Path(where).is_dir() else None

    def _without_weights(self) -> PreTrainedModel:
        """The model on the meta device.

        Raises:
            ValueError: The configuration describes no model.
        """
        try:
            with torch.device("meta"):
                model: PreTrainedModel = AutoModelForCausalLM.from_config(self.config)
        except _BAD_VALUES as error:
            raise ValueError(
                f"the configuration of {self.name!r} describes no model that can be made: "
                f"{one_line(error)}; {DOWNLOAD_AGAIN}."
            ) from None
        return model


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
    is_folder = not options.get("gguf_file") and Path(where).is_dir()
    if is_folder:
        read_json(Path(where) / "config.json")
    try:
        config = AutoConfig.from_pretrained(where, **options)
    except (OSError, *_BAD_VALUES) as error:
        if is_folder:
            raise ValueError(describe_bad_config(Path(where), error)) from None
        if "gguf_file" in options:
            raise ValueError(
                f"{name!r} cannot be read: {one_line(error)}; {DOWNLOAD_AGAIN}."
            ) from None
        raise ValueError(
            f"model {name!r} is neither a folder nor a .gguf file, and the hub does not give it: "
            f"{one_line(error)}."
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


def _is_hub_id(name: str) -> bool:
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


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
        is_folder, is_file = folder_or_file(name, path, ", a .gguf file or a hub ID")
        if is_file or not (is_folder or _is_hub_id(name)):
            raise ValueError(
                f"model {name!r} is neither a folder, a .gguf file nor a hub ID; expected "
                f"{DEMO!r}, a folder, a .gguf file, or an ID such as {_HUB_EXAMPLE!r}."
            )
        if is_folder and not (path / "config.json").is_file():
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
