"""What is written beside the weights: how they were trained, and what they answer."""

import hashlib
import importlib.metadata
import json
from pathlib import Path
from typing import Any

from xattn_video.files import write_json

TRAINING = "TRAINING.json"
_PACKAGES = ("torch", "transformers", "tokenizers", "wonderwords")


def write_training(folder: Path, start_from: Path | None, call: dict[str, Any]) -> None:
    """Add a call of the training script to those of the model that it went on with.

    Args:
        folder: Of the trained model.
        start_from: Of the model before; None for a new one.
        call: ``command``, ``training_seconds``, ``steps`` and ``device``.
    """
    before = None if start_from is None else start_from / TRAINING
    calls = json.loads(before.read_text())["calls"] if before and before.is_file() else []
    record = {
        "made_by": "scripts/train_language_model.py",
        "weights_sha256": weights_digest(folder),
        "versions": {name: importlib.metadata.version(name) for name in _PACKAGES},
        "calls": [*calls, call],
    }
    write_json(folder / TRAINING, record)


def weights_digest(folder: Path) -> str:
    """SHA-256 of the weights' file."""
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
