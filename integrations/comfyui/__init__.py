"""XAttention for ComfyUI's HunyuanVideo and Wan: a node pack for ComfyUI's folder custom_nodes."""

from .sparse_attention import XAttentionNode

NODE_CLASS_MAPPINGS = {"XAttentionSparse": XAttentionNode}
NODE_DISPLAY_NAME_MAPPINGS = {"XAttentionSparse": "XAttention (block-sparse)"}

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"]
