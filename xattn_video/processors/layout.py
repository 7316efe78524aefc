"""Where video and text lie among a model's tokens, and how the operator sees them."""

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from xattn_video.ops.token_order import hilbert_order


@dataclass(frozen=True, slots=True)
class TokenLayout:
    """The tokens of a forward pass. The operator sees canonical order: video, then valid text.

    Args:
        num_video_tokens: Video tokens of one item.
        num_text_tokens: Text tokens of one item, padding included; 0 if the text is not among
            the tokens.
        text_lengths: Valid text tokens of each item; they come before the padding.
        device: The device that runs the layers.
        grid: Frames, rows and columns of the video tokens, if they form a grid.
        causal: Whether a token sees only itself and earlier tokens. Padding is then not cut off.
        permutation: int64 `[S]`: canonical position p holds the model's token ``permutation[p]``.
            None if the model's order is canonical.

    Attributes:
        inverse: int64 `[S]`: the model's token t has canonical position ``inverse[t]``.
    """

    num_video_tokens: int
    num_text_tokens: int
    text_lengths: tuple[int, ...]
    device: torch.device
    grid: tuple[int, int, int] | None = None
    causal: bool = False
    permutation: Tensor | None = None
    inverse: Tensor | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        if self.permutation is not None:
            object.__setattr__(self, "inverse", self.permutation.argsort())

    @classmethod
    def text_first(
        cls, num_video_tokens: int, num_text_tokens: int, batch: int, device: torch.device
    ) -> "TokenLayout":
        """A layout with the text first, all of it valid, followed by the video."""
        places = torch.arange(num_video_tokens + num_text_tokens, device=device)
        return cls(
            num_video_tokens,
            num_text_tokens,
            (num_text_tokens,) * batch,
            device,
            permutation=places.roll(-num_text_tokens),
        )

    def along_hilbert_curve(self) -> "TokenLayout":
        """The same tokens, with the video along a Hilbert curve in canonical order.

        Raises:
            ValueError: The video tokens form no grid.
        """
        if self.grid is None:
            raise ValueError(
                "token_order='hilbert' needs video tokens that form a grid of frames, rows and "
                "columns, and those of this model do not; use token_order='raster'."
            )
        order = torch.cat(
            [hilbert_order(self.grid), torch.arange(self.num_video_tokens, self.num_tokens)]
        ).to(self.device, non_blocking=True)
        # If the canonical order differs from the model's, the curve is applied on top.
        permutation = order if self.permutation is None else self.permutation[order]
        return replace(self, permutation=permutation)

    @property
    def key_lengths(self) -> tuple[int, ...]:
        """Number of valid keys of each item; they come first in canonical order."""
        if self.causal:
            return (self.num_tokens,) * len(self.text_lengths)
        return tuple(self.num_video_tokens + length for length in self.text_lengths)

    @property
    def ragged(self) -> bool:
        """Whether the key lengths of the batch's items differ."""
        return len(set(self.key_lengths)) > 1

    @property
    def num_tokens(self) -> int:
        """Tokens of an item, padding included."""
        return self.num_video_tokens + self.num_text_tokens

    def to_canonical(self, tokens: Tensor) -> Tensor:
        """Bring `[B, S, ...]` from the model's order into canonical order."""
        return tokens if self.permutation is None else tokens.index_select(1, self.permutation)

    def from_canonical(self, tokens: Tensor) -> Tensor:
        """Bring `[B, S, ...]` back into the model's order."""
        return tokens if self.inverse is None else tokens.index_select(1, self.inverse)

    def count_valid_blocks(self, block_size: int) -> int:
        """Blocks that dense attention computes for one head, over the batch."""
        rows = -(-self.num_tokens // block_size)
        if self.causal:
            return len(self.text_lengths) * rows * (rows + 1) // 2
        return rows * sum(-(-length // block_size) for length in self.key_lengths)
