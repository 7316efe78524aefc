"""What was measured at full size, as the package carries it; `benchmarks.write_page` writes it."""

import json
from pathlib import Path
from typing import Any


def read_full_size(name: str) -> dict[str, Any]:
    """``"whole"``, a video dense and sparse, or ``"parts"``, a video on one GPU and on two."""
    text = Path(__file__).with_suffix(".json").read_text(encoding="utf-8")
    found: dict[str, Any] = json.loads(text)[name]
    return found
