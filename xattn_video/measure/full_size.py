"""Reads the full-size measurements in the package; `benchmarks.write_page` writes them."""

import json
from pathlib import Path
from typing import Any


def read_full_size(name: str) -> dict[str, Any]:
    """The record ``"whole"`` (a video dense and sparse) or ``"parts"`` (on one GPU and on two)."""
    text = Path(__file__).with_suffix(".json").read_text(encoding="utf-8")
    found: dict[str, Any] = json.loads(text)[name]
    return found
