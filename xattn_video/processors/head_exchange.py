"""Ulysses: ranks trade the tokens of a layer for heads, attend, and trade back.

Between layers a rank holds a part of the video tokens and all of the text. While it attends it
holds all tokens of a part of the heads, so that blocks are scored and selected as on one GPU.
"""

from dataclasses import dataclass, replace
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
        order: int64 `[H]` on the layers' device, the heads of the first rank first; None if they
            are in their own order.
    """

    group: Any
    rank: int
    num_ranks: int
    num_heads: int
    num_video_tokens: int
    num_text_tokens: int
    order: Tensor | None = None

    def ordered(self, order: Tensor | None) -> "HeadExchange":
        """The same with heads dealt out in another order, equal on all ranks."""
        return replace(self, order=order)

    @property
    def rows(self) -> list[int]:
        """Video tokens of each rank, split as `torch.tensor_split` does."""
        fewest, more = divmod(self.num_video_tokens, self.num_ranks)
        return [fewest + (rank < more) for rank in range(self.num_ranks)]

    def places(self, rank: int) -> slice:
        """Where the heads of a rank are in the order."""
        count = self.num_heads // self.num_ranks
        return slice(rank * count, (rank + 1) * count)

    def pick_heads(self, tensor: Tensor, dim: int) -> Tensor:
        """Those of this rank."""
        own = self.places(self.rank)
        if self.order is None:
            return tensor.narrow(dim, own.start, own.stop - own.start)
        return tensor.index_select(dim, self.order[own])

    def of_own_heads(self, threshold: Tensor) -> Tensor:
        """Tau of the heads of this rank, from a scalar or `[H, 1]`."""
        return threshold if threshold.dim() == 0 else self.pick_heads(threshold, 0)

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
                packed = self._pack(item[:own])
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
            whole[:, num_video:] = self.pick_heads(tokens[:, own:], 2)
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
        if self.order is None:
            return got.transpose(1, 2).flatten(2, 3)
        tokens = attended.new_empty(B, own, self.num_heads, D)
        for rank in range(self.num_ranks):
            tokens.index_copy_(2, self.order[self.places(rank)], got[:, rank])
        return tokens

    def count_heads(self, counts: Tensor) -> Tensor:
        """What every rank has counted for its heads, `[H of this rank]`, as `[H]` in their own
        order; nothing waits for the device.
        """
        places = counts.new_zeros(self.num_heads)
        places[self.places(self.rank)] = counts
        dist.all_reduce(places, group=self.group)
        if self.order is None:
            return places
        return torch.empty_like(places).index_copy_(0, self.order, places)

    def balanced_order(self, counts: Tensor) -> Tensor:
        """An order of heads that gives ranks about equal work: by falling count, to and fro.

        Args:
            counts: The work of each head, `[H]`, on the device.
        """
        turns = torch.arange(self.num_heads, device=counts.device).view(-1, self.num_ranks)
        turns[1::2] = turns[1::2].flip(1)
        return counts.argsort(descending=True, stable=True)[turns.t().flatten()]

    def imbalance(self, counts: Tensor) -> Tensor:
        """The work of the busiest rank over the mean, a scalar on the device."""
        in_order = counts if self.order is None else counts[self.order]
        work = in_order.view(self.num_ranks, -1).sum(1).double()
        return work.max() / work.mean()

    def _pack(self, tokens: Tensor) -> Tensor:
        """`[rows, H, D]` as `[ranks x rows, H of a rank, D]`: what a rank gets lies together."""
        if self.order is None:
            split = tokens.unflatten(1, (self.num_ranks, *self._own_heads))
            return split.transpose(0, 1).flatten(0, 1).contiguous()
        rows = tokens.shape[0]
        packed = tokens.new_empty(self.num_ranks * rows, *self._own_heads, tokens.shape[2])
        for rank in range(self.num_ranks):
            place = packed[rank * rows : (rank + 1) * rows]
            torch.index_select(tokens, 1, self.order[self.places(rank)], out=place)
        return packed

    @property
    def _own_heads(self) -> tuple[int]:
        return (self.num_heads // self.num_ranks,)
