"""Ulysses: ranks trade the tokens of a layer for heads, attend, and trade back.

Between layers a rank holds a part of the video tokens and the whole text. During attention it
holds all tokens for a part of the heads, so that blocks are scored and selected as on one GPU.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True, slots=True)
class HeadExchange:
    """The exchange between the ranks of a group in one forward pass.

    All sizes follow from the arguments, so ranks need not send them and nothing waits for the
    device.

    Args:
        group: The ranks that share a video, a `torch.distributed.ProcessGroup`.
        rank: The rank of this process in the group.
        num_ranks: Number of ranks in the group; it divides ``num_heads``.
        num_heads: Heads of a layer.
        num_video_tokens: Video tokens of an item, over all ranks; every rank holds at least one.
        num_text_tokens: Text tokens of an item, padding included; every rank holds all of them.
        order: The heads, int64 `[H]` on the layers' device, those of the first rank first; None
            means ascending.
    """

    group: Any
    rank: int
    num_ranks: int
    num_heads: int
    num_video_tokens: int
    num_text_tokens: int
    order: Tensor | None = None

    def ordered(self, order: Tensor | None) -> "HeadExchange":
        """The same exchange with another order of heads, which must be equal on all ranks."""
        return replace(self, order=order)

    @property
    def rows(self) -> list[int]:
        """Video tokens of each rank, split as `torch.tensor_split` does."""
        fewest, more = divmod(self.num_video_tokens, self.num_ranks)
        return [fewest + (rank < more) for rank in range(self.num_ranks)]

    def places(self, rank: int) -> slice:
        """The positions of a rank's heads in the order."""
        count = self.num_heads // self.num_ranks
        return slice(rank * count, (rank + 1) * count)

    def pick_heads(self, tensor: Tensor, dim: int) -> Tensor:
        """The heads of this rank, from all heads along ``dim``."""
        own = self.places(self.rank)
        if self.order is None:
            return tensor.narrow(dim, own.start, own.stop - own.start)
        return tensor.index_select(dim, self.order[own])

    def of_own_heads(self, threshold: Tensor) -> Tensor:
        """Tau of this rank's heads, from a scalar or `[H, 1]`."""
        return threshold if threshold.dim() == 0 else self.pick_heads(threshold, 0)

    def to_heads(self, *tensors: Tensor) -> list[Tensor]:
        """Trade tokens for heads; text is not sent, because every rank has it.

        Args:
            tensors: `[B, Sv of this rank + St, H, D]`, the text after the video.

        Returns:
            `[B, Sv + St, H of this rank, D]` each, contiguous.

        Raises:
            ValueError: The tokens were split differently.
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
                video, places = item[:own], place[:num_video].split(rows)
                sent = {
                    rank: [self._pick(video, rank, video.new_empty(own, *self._own_heads, D))]
                    for rank in self._others
                }
                got = {rank: [places[rank]] for rank in self._others}
                # During the transfer, own tokens are copied and the next tensor is packed.
                transfers.append((self._trade(sent, got), sent))
                self._pick(video, self.rank, places[self.rank])
            whole[:, num_video:] = self.pick_heads(tokens[:, own:], 2)
            traded.append(whole)
        for transfer, _ in transfers:
            _wait(transfer)
        return traded

    def to_tokens(self, attended: Tensor) -> Tensor:
        """Trade heads for tokens: this rank's video tokens and the text, with all heads.

        Args:
            attended: `[B, Sv + St, H of this rank, D]`.

        Returns:
            `[B, Sv of this rank + St, H, D]`, contiguous.
        """
        B, D = attended.shape[0], attended.shape[3]
        sizes = [self.rows[self.rank], self.num_text_tokens]
        tokens = attended.new_empty(B, sum(sizes), self.num_heads, D)
        got = attended.new_empty(B, self.num_ranks - 1, sum(sizes), *self._own_heads, D)
        transfers = []
        for item, place, parts in zip(attended, tokens, got, strict=True):
            *videos, text = item.split([*self.rows, self.num_text_tokens])
            sent = {rank: [videos[rank], text] for rank in self._others}
            arriving = zip(self._others, parts, strict=True)
            transfers.append(
                self._trade(sent, {rank: list(part.split(sizes)) for rank, part in arriving})
            )
            own = [videos[self.rank], text]
            for part, rows in zip(own, place.split(sizes), strict=True):
                self._put(part, self.rank, rows)
        for transfer, place, parts in zip(transfers, tokens, got, strict=True):
            _wait(transfer)
            for rank, part in zip(self._others, parts, strict=True):
                self._put(part, rank, place)
        return tokens

    def count_heads(self, counts: Tensor) -> Tensor:
        """Gather counts by head, `[H of this rank]` on each rank, to `[H]` in ascending order.

        Nothing waits for the device.
        """
        places = counts.new_zeros(self.num_heads)
        places[self.places(self.rank)] = counts
        dist.all_reduce(places, group=self.group)
        if self.order is None:
            return places
        return torch.empty_like(places).index_copy_(0, self.order, places)

    def balanced_order(self, counts: Tensor) -> Tensor:
        """An order of heads that gives all ranks similar work: by falling count, back and forth.

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

    def _trade(self, sent: dict[int, list[Tensor]], got: dict[int, list[Tensor]]) -> list[Any]:
        """Start sending and receiving tensors, `{rank: tensors}`.

        A collective would also copy the rank's own part, at the speed of the link.
        """
        operations = [
            dist.P2POp(function, tensor, group=self.group, group_peer=rank)
            for function, tensors in ((dist.isend, sent), (dist.irecv, got))
            for rank, parts in tensors.items()
            for tensor in parts
        ]
        works: list[Any] = dist.batch_isend_irecv(operations)
        return works

    def _pick(self, tokens: Tensor, rank: int, out: Tensor) -> Tensor:
        """Copy the heads of a rank from `[rows, H, D]` into `[rows, H of a rank, D]`."""
        tokens, places = _wide(tokens), self.places(rank)
        if self.order is None:
            _wide(out).copy_(tokens[:, places])
        else:
            torch.index_select(tokens, 1, self.order[places], out=_wide(out))
        return out

    def _put(self, part: Tensor, rank: int, tokens: Tensor) -> None:
        """Copy the heads of a rank, `[rows, H of a rank, D]`, into `[rows, H, D]`."""
        part, tokens, places = _wide(part), _wide(tokens), self.places(rank)
        if self.order is None:
            tokens[:, places] = part
        else:
            tokens.index_copy_(1, self.order[places], part)

    @property
    def _others(self) -> list[int]:
        return [rank for rank in range(self.num_ranks) if rank != self.rank]

    @property
    def _own_heads(self) -> tuple[int]:
        return (self.num_heads // self.num_ranks,)


def _wait(works: list[Any]) -> None:
    """Make later work on the device wait for the transfers."""
    for work in works:
        work.wait()


def _wide(tensor: Tensor) -> Tensor:
    """A view of the same bytes as fewer and larger numbers, which are copied faster."""
    fits = tensor.shape[-1] * tensor.element_size() % torch.complex128.itemsize == 0
    return tensor.view(torch.complex128) if fits else tensor
