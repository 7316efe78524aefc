"""Runs of the scripts of `eval_language` with real harnesses and made data, without a network."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


def run_script(name: str, folder: Path, *words: str) -> tuple[str, dict[str, Any]]:
    """Run a script to its end in a folder; returns its messages and its report."""
    command = ["bash", ROOT / "scripts" / name, "--run", "run", "--device=cpu", *words]
    environment = os.environ | {
        "HF_HOME": str(folder / "home"),
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": str(ROOT),
    }
    options = {"capture_output": True, "text": True, "check": False}
    done = subprocess.run(command, cwd=folder, env=environment, **options)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stderr, json.loads((folder / "run/report.json").read_text())
