"""What the layers keep from one denoising step for later ones: blocks and residuals."""

from collections.abc import Hashable

import torch
from torch import Tensor

from xattn_video.ops.blocks import BlockLists
from xattn_video.policy.settings import SparseSettings
from xattn_video.processors.residual import PassResiduals


class KeptByPass:
    """What the layers keep from one of a step's forward passes.

    Args:
        settings: The settings of sparse attention.
        num_layers: Number of layers that may keep something.

    Attributes:
        residuals: The residuals; None without refreshes.
        made: The step at which each layer made what it keeps.
    """

    def __init__(self, settings: SparseSettings, num_layers: int) -> None:
        refreshes = settings.refresh_every is not None
        self.residuals = PassResiduals(settings.residual, num_layers) if refreshes else None
        self.made: dict[str, int] = {}
        self._bits: dict[str, tuple[Tensor, int]] = {}

    def keep_blocks(self, layer: str, blocks: BlockLists) -> None:
        """Keep the blocks that a layer chose."""
        self._bits[layer] = blocks.to_bits(), blocks.indices.shape[-1]

    def blocks(self, layer: str) -> BlockLists | None:
        """The blocks that a layer chose last; None if it chose none yet."""
        return BlockLists.from_bits(*self._bits[layer]) if layer in self._bits else None


class KeptStore:
    """What is kept in a generation, by pass: true classifier-free guidance has two per step."""

    def __init__(self) -> None:
        self._passes: dict[int, tuple[Hashable, KeptByPass]] = {}

    def of_pass(
        self, number: int, identity: Hashable, settings: SparseSettings, num_layers: int
    ) -> KeptByPass:
        """What a step's forward pass keeps; empty if the pass has another identity than before.

        Args:
            number: Number of the pass within its step.
            identity: What must not change: settings, sizes, prompts, dtype, device.
            settings: The settings of sparse attention.
            num_layers: Number of layers that may keep something.
        """
        before = self._passes.get(number)
        if before is not None and before[0] == identity:
            return before[1]
        kept = KeptByPass(settings, num_layers)
        self._passes[number] = identity, kept
        return kept

    def drop(self, kept: KeptByPass) -> None:
        """Free what one pass keeps."""
        self._passes = {number: one for number, one in self._passes.items() if one[1] is not kept}

    def clear(self) -> None:
        """Free everything."""
        self._passes.clear()

    def close(self) -> None:
        """Free everything, and the pinned memory that torch would keep for reuse."""
        self.clear()
        # Exists from torch 2.10 on.
        empty_host_cache = getattr(torch.accelerator, "empty_host_cache", None)
        if empty_host_cache is not None and torch.cuda.is_initialized():
            empty_host_cache()
