"""What XAttention has to know of a family of transformers."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from xattn_video.policy.steps import ForwardInputs
from xattn_video.processors.layout import TokenLayout


@dataclass(frozen=True, slots=True)
class Family:
    """One record a family; a new model is a new file with one of these.

    Attributes:
        name: As people call it.
        transformers: Diffusers' classes.
        covers: Which models these are, for messages.
        attentions: transformer -> {layer name: attention module} of layers that can be sparse.
        read_forward: transformer and its forward's arguments by name -> what is read of them.
        forward_arguments: The names of the forward's arguments, in their order.
        layout: config, inputs and the layers' device -> where the tokens lie.
        attention: The processor of a layer, in Diffusers' own numbered steps: attention module,
            its slot, and what Diffusers gives a processor.
        context_parallel_plan: Where Diffusers splits the video tokens among ranks and gathers
            them; the text stays whole.
        unsplit_reason: config -> why the model's tokens cannot be split so, or None.
    """

    name: str
    transformers: tuple[type[nn.Module], ...]
    covers: str
    attentions: Callable[[Any], dict[str, Any]]
    read_forward: Callable[[nn.Module, Mapping[str, Any]], ForwardInputs]
    forward_arguments: tuple[str, ...]
    layout: Callable[[Any, ForwardInputs, torch.device], TokenLayout]
    attention: Callable[..., Tensor | tuple[Tensor, Tensor]]
    context_parallel_plan: dict[str, Any]
    unsplit_reason: Callable[[Any], str | None]
