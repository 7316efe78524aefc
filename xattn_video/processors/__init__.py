"""The Diffusers side: the attention processor, and how to enable it."""

from xattn_video.processors.context_parallel import (
    disable_context_parallel,
    enable_context_parallel,
)
from xattn_video.processors.enable import XAttentionHandle, enable_on_transformer
from xattn_video.processors.processor import XAttnProcessor
from xattn_video.top_level import become

__all__ = [
    "XAttentionHandle",
    "XAttnProcessor",
    "disable_context_parallel",
    "enable_context_parallel",
    "enable_on_transformer",
]

if __name__ == "processors":
    become(__name__)
