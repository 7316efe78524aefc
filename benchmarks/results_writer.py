"""Writes the result file of a benchmark: machine and versions, rows, and failures."""

import os
import platform
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from xattn_video.files import check_output_path, write_json
from xattn_video.reporting.machine import installed_versions

PACKAGES = (
    "torch",
    "triton",
    "diffusers",
    "transformers",
    "flash-attn-4",
    "block-sparse-attn",
    "xattn-video",
)


def environment(device: torch.device, commit: str | None = None) -> dict[str, Any]:
    """The machine, the versions and the commit of a measurement.

    Args:
        device: The device that was measured.
        commit: The commit of this repository; None asks git.
    """
    return {
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "cpu": _cpu_name(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": dict.fromkeys(PACKAGES) | installed_versions(PACKAGES),
        "commit": commit or _commit(),
        "command": _command(),
        "date": time.strftime("%Y-%m-%d"),
    }


def _cpu_name() -> str:
    """The processor's own name if Linux tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _command() -> str:
    """The command as typed, without the output option."""
    module = Path(sys.argv[0]).stem
    words = sys.argv[1:]
    if "--output" in words:
        place = words.index("--output")
        del words[place : place + 2]
    num_ranks = os.environ.get("WORLD_SIZE", "1")
    launcher = ["python"] if num_ranks == "1" else ["torchrun", "--nproc-per-node", num_ranks]
    return shlex.join([*launcher, "-m", f"benchmarks.{module}", *words])


def _commit() -> str | None:
    """Git's description of the checked-out commit; None outside a repository."""
    git = shutil.which("git")
    if git is None:
        return None
    described = subprocess.run(
        [git, "describe", "--always", "--dirty"],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent,
    )
    return described.stdout.strip() or None


class ResultsWriter:
    """Rows and failures. The file is rewritten after each, so a killed run keeps its rows.

    Raises:
        ValueError: The file cannot be written.
    """

    def __init__(self, path: Path | None, found: dict[str, Any]) -> None:
        self.rows: list[dict[str, Any]] = []
        self.failures: list[dict[str, Any]] = []
        self._path = path
        self._environment = found
        if path is not None:
            check_output_path(path, (".json",))

    def add(self, row: dict[str, Any], done: bool) -> None:
        """Add a row, or, if ``done`` is False, a failure."""
        (self.rows if done else self.failures).append(row)
        if self._path is None:
            return
        content = {**self._environment, "rows": self.rows, "failures": self.failures}
        write_json(self._path, content, indent=1)
