"""The node, and the override of ComfyUI's attention that it sets on a model."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from xattn_video import available_backends, xattention
from xattn_video.policy.settings import DEFAULT_THRESHOLD, SparseSettings

logger = logging.getLogger("xattn_video.comfyui")

_OVERRIDE = "optimized_attention_override"
_WRAPPER = "xattn_video"
# ComfyUI's classes of these models and of their variants.
_SUPPORTED = {"HunyuanVideo", "WanModel"}


@dataclass(frozen=True, slots=True)
class NodeSettings:
    """The settings that a user chose.

    Attributes:
        threshold, stride, backend: As in `xattention`.
        highest_sigma, lowest_sigma: Steps with lowest_sigma < sigma <= highest_sigma are sparse.
        dense_blocks: Numbers of blocks that stay dense; single blocks follow the double ones.
        min_tokens: With fewer video tokens, everything stays dense.
        verbose: Whether each step logs a line.
    """

    threshold: float
    stride: int
    backend: str
    highest_sigma: float
    lowest_sigma: float
    dense_blocks: frozenset[int]
    min_tokens: int
    verbose: bool

    def sparse_at(self, sigma: float) -> bool:
        """Whether a step with this sigma is sparse."""
        return self.lowest_sigma < sigma <= self.highest_sigma


@dataclass(slots=True)
class Forward:
    """Step and sizes of a forward pass of the model.

    Attributes:
        sparse: Whether the step is sparse and the video long enough.
        video_tokens: Video tokens of one item.
        text_first: Whether the text comes before the video.
        double_blocks: Number of double blocks, which come before the single ones.
        sparse_layers: Number of layers that ran sparse so far.
        mask: Block mask of the first sparse layer; only for `NodeSettings.verbose`.
    """

    sparse: bool
    video_tokens: int
    text_first: bool
    double_blocks: int
    sparse_layers: int = 0
    mask: Tensor | None = None


class SparseAttention:
    """Replaces ComfyUI's attention, and wraps the model's forward pass to read step and sizes.

    Args:
        settings: The settings that the user chose.
        previous: The override of another node, which dense layers use.
    """

    def __init__(self, settings: NodeSettings, previous: Callable[..., Tensor] | None) -> None:
        self.settings = settings
        self._previous = previous
        self._forward: Forward | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> "SparseAttention":
        """Return the same object, which a copied model's options and its wrapper must share."""
        return self

    def wrap_forward(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        """ComfyUI's wrapper of a model's forward pass; its first argument is the latents."""
        options = next(a for a in (*args, *kwargs.values()) if _is_options(a))
        self._forward = forward = self._read(executor.class_obj, args[0], options)
        try:
            return executor(*args, **kwargs)
        finally:
            if self.settings.verbose:
                self._tell(forward, options)
            self._forward = None

    def __call__(
        self,
        function: Callable[..., Tensor],
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *args: Any,
        **kw: Any,
    ) -> Tensor:
        """ComfyUI's `optimized_attention_override`: ``function`` is its dense attention."""
        heads = kw["heads"] if "heads" in kw else args[0]
        mask = kw.get("mask", args[1] if len(args) > 1 else None)
        forward = self._forward
        if forward is not None and self._is_sparse(forward, q, k, mask, kw):
            triple = [q, k, v]
            if not kw.get("skip_reshape"):
                triple = [x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in triple]
            output = self._attend(forward, triple, mask)
            if kw.get("skip_output_reshape"):
                return output
            return output.transpose(1, 2).flatten(2)
        if self._previous is not None:
            return self._previous(function, q, k, v, *args, **kw)
        return function(q, k, v, *args, **kw)

    def _read(self, model: Any, latents: Tensor, options: dict[str, Any]) -> Forward:
        """Step and sizes of a forward pass; reads the sigma from the device once."""
        sizes = zip(latents.shape[-3:], model.patch_size, strict=True)
        video_tokens = 1
        for size, patch in sizes:
            video_tokens *= -(-size // patch)
        sigma = float(options["sigmas"].flatten()[0])
        double = list(getattr(model, "double_blocks", ()))
        return Forward(
            sparse=self.settings.sparse_at(sigma) and video_tokens >= self.settings.min_tokens,
            video_tokens=video_tokens,
            # Until the summer of 2025 ComfyUI put the text after the video.
            text_first=not (double and getattr(double[0], "flipped_img_txt", False)),
            double_blocks=len(double),
        )

    def _is_sparse(
        self, forward: Forward, q: Tensor, k: Tensor, mask: Tensor | None, kw: dict[str, Any]
    ) -> bool:
        """Whether a call is the self-attention of a block that must run sparse."""
        options = kw.get("transformer_options") or {}
        if not forward.sparse or "block_type" not in options:
            return False
        tokens = q.shape[-2]
        # Cross-attention has other keys, and attention over text alone is short.
        if tokens != k.shape[-2] or tokens < forward.video_tokens:
            return False
        if mask is not None and not _is_of_keys(mask, tokens):
            return False
        number = options["block_index"]
        if options["block_type"] == "single":
            number += forward.double_blocks
        return number not in self.settings.dense_blocks

    def _attend(self, forward: Forward, triple: list[Tensor], mask: Tensor | None) -> Tensor:
        """Sparse attention of `[B, H, S, D]`; text is moved after the video and back."""
        settings, batch = self.settings, triple[0].shape[0]
        text = triple[0].shape[-2] - forward.video_tokens if forward.double_blocks else 0
        moves = text > 0 and forward.text_first
        if moves:
            triple = [torch.cat((x[:, :, text:], x[:, :, :text]), dim=2) for x in triple]
        lengths = None if mask is None else _valid(mask).sum(-1).expand(batch).to(torch.int32)
        options: dict[str, Any] = {
            "threshold": settings.threshold,
            "stride": settings.stride,
            "backend": settings.backend,
            "num_text_tokens": text,
            "key_lengths": lengths,
        }
        if settings.verbose and forward.mask is None:
            output, forward.mask = xattention(*triple, **options, return_block_mask=True)
        else:
            output = xattention(*triple, **options)
        forward.sparse_layers += 1
        if moves:
            video = forward.video_tokens
            output = torch.cat((output[:, :, video:], output[:, :, :video]), dim=2)
        return output

    def _tell(self, forward: Forward, options: dict[str, Any]) -> None:
        """Log what a forward pass did."""
        step, steps = step_of(options)
        if forward.mask is None:
            logger.info("step %d/%d: dense, %d video tokens", step, steps, forward.video_tokens)
            return
        logger.info(
            "step %d/%d: %d layers sparse, %d video tokens, first layer's density %.2f",
            step,
            steps,
            forward.sparse_layers,
            forward.video_tokens,
            forward.mask.float().mean().item(),
        )


def step_of(options: dict[str, Any]) -> tuple[int, int]:
    """The step, from 1, whose sigma is nearest, and the number of steps."""
    schedule = options.get("sample_sigmas")
    if schedule is None:
        return 1, 1
    sigma = options["sigmas"].flatten()[0].to(schedule)
    # The last sigma is the one after the last step.
    return int((schedule[:-1] - sigma).abs().argmin()) + 1, len(schedule) - 1


def parse_blocks(text: str) -> frozenset[int]:
    """The numbers in a list such as "0, 1, 57-59".

    Raises:
        ValueError: The text is not such a list.
    """
    numbers: set[int] = set()
    for part in filter(None, (part.strip() for part in text.split(","))):
        first, _, last = part.partition("-")
        try:
            numbers.update(range(int(first), int(last or first) + 1))
        except ValueError:
            raise ValueError(
                f"dense_blocks must be numbers such as 0, 1, 57-59, got {part!r}."
            ) from None
    return frozenset(numbers)


def _is_options(value: object) -> bool:
    return isinstance(value, dict) and "sigmas" in value


def _is_of_keys(mask: Tensor, tokens: int) -> bool:
    """Whether a mask is the same for all heads and queries, as a padding mask is."""
    return mask.dim() > 2 and mask.shape[-1] == tokens and mask[..., 0].numel() == mask.shape[0]


def _valid(mask: Tensor) -> Tensor:
    """Valid keys of a mask, bool `[B or 1, S]`; an additive mask is 0 at these."""
    keys = mask.reshape(mask.shape[0], mask.shape[-1])
    return keys if keys.dtype == torch.bool else keys > torch.finfo(keys.dtype).min / 2


class XAttentionNode:
    """ComfyUI's node: returns a copy of a model with sparse attention."""

    CATEGORY = "model_patches/attention"
    RETURN_TYPES = ("MODEL",)
    FUNCTION = "patch"
    DESCRIPTION = "Block-sparse attention (XAttention) for HunyuanVideo and Wan."

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802
        """The node's inputs, by ComfyUI's names."""
        share = {"min": 0.0, "max": 1.0, "step": 0.01}
        # The value that was measured on a GPU, because ComfyUI is used on GPUs.
        tokens = SparseSettings().min_tokens_on("cuda")
        return {
            "required": {
                "model": ("MODEL",),
                "threshold": (
                    "FLOAT",
                    share
                    | {
                        "default": DEFAULT_THRESHOLD,
                        "min": 0.01,
                        "tooltip": "Share of the attention mass that each row of blocks keeps.",
                    },
                ),
                "start_percent": (
                    "FLOAT",
                    share
                    | {
                        "default": 0.1,
                        "tooltip": "Attention is dense before this fraction of the sampling.",
                    },
                ),
                "end_percent": (
                    "FLOAT",
                    share
                    | {
                        "default": 1.0,
                        "tooltip": "Attention is dense again after this fraction of the sampling.",
                    },
                ),
                "dense_blocks": (
                    "STRING",
                    {
                        "default": "",
                        "tooltip": "Transformer blocks that stay dense, such as 0, 1, 57-59.",
                    },
                ),
                "min_tokens": (
                    "INT",
                    {"default": tokens, "min": 0, "max": 2**20, "step": 1024},
                ),
                "stride": ([4, 8, 16], {"default": 8}),
                "backend": (["auto", *available_backends("cpu")], {"default": "auto"}),
                "verbose": ("BOOLEAN", {"default": False}),
            }
        }

    def patch(
        self,
        model: Any,
        threshold: float,
        start_percent: float,
        end_percent: float,
        dense_blocks: str,
        min_tokens: int,
        **rest: Any,
    ) -> tuple[Any]:
        """A copy of the model with sparse attention.

        Raises:
            ValueError: The model is not supported, or a value is out of range.
        """
        found = type(model.get_model_object("diffusion_model"))
        if not _SUPPORTED & {base.__name__ for base in found.__mro__}:
            raise ValueError(
                f"this node supports ComfyUI's HunyuanVideo and Wan models, got {found.__name__}; "
                "remove the node for this model."
            )
        if start_percent >= end_percent:
            raise ValueError(
                f"start_percent must be below end_percent, got {start_percent} and {end_percent}."
            )
        sampling = model.get_model_object("model_sampling")
        settings = NodeSettings(
            threshold=threshold,
            stride=rest.get("stride", 8),
            backend=rest.get("backend", "auto"),
            highest_sigma=float(sampling.percent_to_sigma(start_percent)),
            lowest_sigma=float(sampling.percent_to_sigma(end_percent)),
            dense_blocks=parse_blocks(dense_blocks),
            min_tokens=min_tokens,
            verbose=rest.get("verbose", False),
        )
        copy = model.clone()
        options = copy.model_options.setdefault("transformer_options", {})
        if isinstance(options.get(_OVERRIDE), SparseAttention):
            raise ValueError(
                "this model already has XAttention; use only one such node per model."
            )
        attention = SparseAttention(settings, options.get(_OVERRIDE))
        options[_OVERRIDE] = attention
        # The name of this wrapper type in comfy.patcher_extension.
        copy.add_wrapper_with_key("diffusion_model", _WRAPPER, attention.wrap_forward)
        return (copy,)
