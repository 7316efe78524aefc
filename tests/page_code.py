"""Code that documentation shows, and the small stand-in for the model that it loads."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import HunyuanVideoPipeline

from xattn_video.policy.settings import SparseSettings

HUB_ID = "hunyuanvideo-community/HunyuanVideo"
NUM_STEPS = 8
SMALL = {"height": 64, "width": 64, "num_frames": 9, "num_inference_steps": NUM_STEPS}


def blocks_of(language: str, page: Path) -> list[str]:
    """The code of one language on a page."""
    text = page.read_text(encoding="utf-8")
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def run_snippets(page: Path, namespace: dict[str, Any] | None = None) -> dict[str, Any]:
    """Run the Python of a page, one snippet after the other; the names that they leave."""
    namespace = {} if namespace is None else namespace
    for code in blocks_of("python", page):
        exec(compile(code, page.name, "exec"), namespace)
    return namespace


def replace_hub(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let HunyuanVideo's hub ID load the folder in bfloat16, make small videos, need no GPU."""
    load, run = HunyuanVideoPipeline.from_pretrained, HunyuanVideoPipeline.__call__
    offload_groups = HunyuanVideoPipeline.enable_group_offload

    def from_pretrained(name: str, dtype: Any) -> HunyuanVideoPipeline:
        assert name == HUB_ID
        assert dtype in (torch.bfloat16, {"transformer": torch.bfloat16, "default": torch.float16})
        pipe = load(folder, dtype=torch.bfloat16)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def small(self: HunyuanVideoPipeline, prompt: str, **options: Any) -> Any:
        return run(self, prompt, **(options | SMALL))

    def on_the_cpu(
        self: HunyuanVideoPipeline, onload_device: torch.device, use_stream: bool, **options: Any
    ) -> None:
        assert (onload_device.type, use_stream) == ("cuda", True)
        offload_groups(self, onload_device=torch.device("cpu"), **options)

    replacements = {
        "from_pretrained": from_pretrained,
        "__call__": small,
        "enable_group_offload": on_the_cpu,
        # Accelerate offloads to a GPU alone.
        "enable_model_cpu_offload": lambda pipe: None,
    }
    for name, function in replacements.items():
        monkeypatch.setattr(HunyuanVideoPipeline, name, function)
    # Videos this small would be dense throughout.
    monkeypatch.setattr(SparseSettings, "min_tokens_on", lambda settings, device_type: 0)
