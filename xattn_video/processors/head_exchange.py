"""Ulysses: ranks trade the tokens of a layer for heads, attend, and trade back.

Between layers a rank holds a part of the video tokens and all of the text. While it attends it
holds all tokens of a part of the heads, so that blocks are scored and selected as on one GPU.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True, slots=True)
class HeadExchange:
    """What the ranks of a group trade in one forward pass.

    All sizes follow from the arguments: ranks tell each other none, and nothing waits for the
    device.

    Args:
        group: The ranks that share a video, a `torch.distributed.ProcessGroup`.
        rank: This process's, in the group.
        num_ranks: Of the group; it divides ``num_heads``.
        num_heads: Of a layer.
        num_video_tokens: Of an item, over all ranks; every rank holds at least one.
        num_text_tokens: Of an item, padding included; every rank holds them all.
    """

    group: Any
    rank: int
    num_ranks: int
    num_heads: int
    num_video_tokens: int
    num_text_tokens: int

    @property
    def rows(self) -> list[int]:
        """Video tokens of each rank, split as `torch.tensor_split` does."""
        fewest, more = divmod(self.num_video_tokens, self.num_ranks)
        return [fewest + (rank < more) for rank in range(self.num_ranks)]

    @property
    def heads(self) -> slice:
        """The heads of this rank."""
        count = self.num_heads // self.num_ranks
        return slice(self.rank * count, (self.rank + 1) * count)

    def of_own_heads(self, threshold: Tensor) -> Tensor:
        """Tau of the heads of this rank, from a scalar or `[H, 1]`."""
        return threshold if threshold.dim() == 0 else threshold[self.heads]

    def to_heads(self, *tensors: Tensor) -> list[Tensor]:
        """Trade tokens for heads; the text, which is here already, takes no part.

        Args:
            tensors: `[B, Sv of this rank + St, H, D]`, the text behind the video.

        Returns:
            `[B, Sv + St, H of this rank, D]` each, contiguous.

        Raises:
            ValueError: The tokens were split in another way.
        """
        rows = self.rows
        own, num_video = rows[self.rank], self.num_video_tokens
        traded, transfers = [], []
        for tokens in tensors:
            if tokens.shape[1:3] != (own + self.num_text_tokens, self.num_heads):
                raise ValueError(
                    f"rank {self.rank} of {self.num_ranks} must hold {own} of "
                    f"{num_video} video tokens and all {self.num_text_tokens} text tokens with "
                    f"{self.num_heads} heads, got {tokens.shape[1]} tokens with "
                    f"{tokens.shape[2]} heads; split them as enable_context_parallel does: call "
                    "disable_context_parallel(transformer) first."
                )
            B, D = tokens.shape[0], tokens.shape[3]
            whole = tokens.new_empty(B, num_video + self.num_text_tokens, *self._own_heads, D)
            for item, place in zip(tokens, whole, strict=True):
                # [ranks x rows, heads of a rank, D]: what each rank is to get lies together.
                packed = item[:own].unflatten(1, (self.num_ranks, *self._own_heads))
                packed = packed.transpose(0, 1).flatten(0, 1).contiguous()
                # What comes lands where it belongs, while the next tensor is packed.
                transfer = dist.all_to_all_single(
                    place[:num_video],
                    packed,
                    rows,
                    [own] * self.num_ranks,
                    self.group,
                    async_op=True,
                )
                transfers.append((transfer, packed))
            whole[:, num_video:] = tokens[:, own:, self.heads]
            traded.append(whole)
        for transfer, _ in transfers:
            transfer.wait()
        return traded

    def to_tokens(self, attended: Tensor) -> Tensor:
        """Trade heads for tokens: video tokens of this rank, and the text with all heads.

        Args:
            attended: `[B, Sv + St, H of this rank, D]`.

        Returns:
            `[B, Sv of this rank + St, H, D]`, contiguous.
        """
        B, D = attended.shape[0], attended.shape[3]
        sizes = [count + self.num_text_tokens for count in self.rows]
        own = sizes[self.rank]
        got = attended.new_empty(B, self.num_ranks, own, *self._own_heads, D)
        for item, place in zip(attended, got, strict=True):
            video, text = item.split([self.num_video_tokens, self.num_text_tokens])
            parts = [part for rank_video in video.split(self.rows) for part in (rank_video, text)]
            dist.all_to_all_single(
                place.flatten(0, 1), torch.cat(parts), [own] * self.num_ranks, sizes, self.group
            )
        return got.transpose(1, 2).flatten(2, 3)

    def sum_over_ranks(self, count: Tensor) -> Tensor:
        """The sum of what every rank has counted, on the device."""
        total = count.clone()
        dist.all_reduce(total, group=self.group)
        return total

    @property
    def _own_heads(self) -> tuple[int]:
        return (self.num_heads // self.num_ranks,)
