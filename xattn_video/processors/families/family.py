"""What XAttention must know about a family of transformers."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from xattn_video.policy.steps import ForwardInputs
from xattn_video.processors.layout import TokenLayout


@dataclass(frozen=True, slots=True)
class Family:
    """The record of one family. To support a new model, add a file with such a record.

    Attributes:
        name: The usual name of the family.
        transformers: The transformer classes of Diffusers.
        covers: The models of the family, for messages.
        attentions: Function (transformer) -> {layer name: attention module}, for the layers that
            can run sparse.
        read_forward: Function (transformer, arguments of its forward by name) -> `ForwardInputs`.
        forward_arguments: The names of the forward's arguments, in order.
        layout: Function (config, inputs, device of the layers) -> `TokenLayout`.
        attention: The processor of a layer in Diffusers' own numbered steps. It takes the
            attention module, its slot, and the arguments that Diffusers gives a processor.
        context_parallel_plan: Where Diffusers splits the video tokens among ranks and gathers
            them; the text stays whole.
        unsplit_reason: Function (config) -> why the model's tokens cannot be split, or None.
    """

    name: str
    transformers: tuple[type[nn.Module], ...]
    covers: tuple[str, ...]
    attentions: Callable[[Any], dict[str, Any]]
    read_forward: Callable[[nn.Module, Mapping[str, Any]], ForwardInputs]
    forward_arguments: tuple[str, ...]
    layout: Callable[[Any, ForwardInputs, torch.device], TokenLayout]
    attention: Callable[..., Tensor | tuple[Tensor, Tensor]]
    context_parallel_plan: dict[str, Any]
    unsplit_reason: Callable[[Any], str | None]
