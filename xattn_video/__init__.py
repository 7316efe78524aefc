"""Block-sparse attention (XAttention, arXiv:2503.16428) for video and language models."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from xattn_video.backends.table import available_backends
    from xattn_video.enabling import enable_xattention
    from xattn_video.errors import (
        BackendUnavailableError,
        UnboundProcessorError,
        UnsupportedModelError,
        XAttentionError,
    )
    from xattn_video.language.prefill_report import PrefillReport
    from xattn_video.language.registration import register_attention
    from xattn_video.ops.attention import attend, block_sparse_attention, xattention
    from xattn_video.ops.blocks import BlockLists
    from xattn_video.ops.scoring import block_scores
    from xattn_video.ops.selection import select, select_blocks
    from xattn_video.policy.report import SparsityReport
    from xattn_video.policy.schedule import ThresholdSchedule
    from xattn_video.processors import (
        XAttnProcessor,
        disable_context_parallel,
        enable_context_parallel,
    )

__version__ = "0.1.0"

_MODULES = {
    "BackendUnavailableError": "errors",
    "BlockLists": "ops.blocks",
    "PrefillReport": "language.prefill_report",
    "SparsityReport": "policy.report",
    "ThresholdSchedule": "policy.schedule",
    "UnboundProcessorError": "errors",
    "UnsupportedModelError": "errors",
    "XAttentionError": "errors",
    "XAttnProcessor": "processors",
    "attend": "ops.attention",
    "available_backends": "backends.table",
    "block_scores": "ops.scoring",
    "block_sparse_attention": "ops.attention",
    "disable_context_parallel": "processors",
    "enable_context_parallel": "processors",
    "enable_xattention": "enabling",
    "register_attention": "language.registration",
    "select": "ops.selection",
    "select_blocks": "ops.selection",
    "xattention": "ops.attention",
}

__all__ = [
    "BackendUnavailableError",
    "BlockLists",
    "PrefillReport",
    "SparsityReport",
    "ThresholdSchedule",
    "UnboundProcessorError",
    "UnsupportedModelError",
    "XAttentionError",
    "XAttnProcessor",
    "attend",
    "available_backends",
    "block_scores",
    "block_sparse_attention",
    "disable_context_parallel",
    "enable_context_parallel",
    "enable_xattention",
    "register_attention",
    "select",
    "select_blocks",
    "xattention",
]


def __getattr__(name: str) -> Any:
    """Import a public name on first use, so that the operator needs only torch."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
