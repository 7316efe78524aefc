"""True classifier-free guidance over two groups of ranks: each computes one of the two passes.

The pipeline calls the transformer twice in every step and then combines both results. Each group
computes one of the calls. The other call returns an empty tensor at once, which the partner's
result fills before the pipeline reads it.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from xattn_video.policy.report import ForwardRun, SparsityReport
from xattn_video.processors.replaced import replaced

_ATTRIBUTE = "_xattn_guidance"


class GuidanceSplit:
    """Which pass of a step this rank computes, and which rank computes the other.

    The first half of the ranks computes the first pass. Rank r of the first half trades results
    with rank r of the second half.
    """

    def __init__(self) -> None:
        half = dist.get_world_size() // 2
        rank = dist.get_rank()
        self._own_pass = rank // half
        self._partner = (rank + half) % (2 * half)
        self._calls = 0
        self._first: Tensor | None = None

    def forward(self, real: Any, config: Any, *args: Any, **options: Any) -> tuple[Tensor]:
        """One call of the transformer: computed here, or by the partner.

        Args:
            real: The transformer's own forward.
            config: The configuration of the transformer.
            args, options: Arguments of the call, with ``return_dict=False``.

        Returns:
            A tuple of the sample, complete once the second call of the step has returned.
        """
        number, self._calls = self._calls % 2, self._calls + 1
        if number == self._own_pass:
            own: Tensor = real(*args, **options)[0]
        else:
            latents: Tensor = options["hidden_states"]
            shape = (latents.shape[0], config.out_channels, *latents.shape[2:])
            own = latents.new_empty(shape)
        if number == 0:
            self._first = own
            return (own,)
        first, self._first = self._first, None
        assert first is not None
        computed, lacking = (first, own) if self._own_pass == 0 else (own, first)
        got = torch.empty_like(lacking)
        transfers = [
            dist.P2POp(dist.isend, computed.contiguous(), self._partner),
            dist.P2POp(dist.irecv, got, self._partner),
        ]
        for transfer in dist.batch_isend_irecv(transfers):
            transfer.wait()
        lacking.copy_(got)
        return (own,)

    def whole(self, report: SparsityReport) -> SparsityReport:
        """The report with the passes that the partner computed; both ranks call this."""
        reports: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(reports, report)
        theirs: SparsityReport = reports[self._partner]
        forwards = map(_computed, report.forwards, theirs.forwards)
        return replace(report, forwards=tuple(forwards))


def enable_guidance_split(pipe: Any) -> None:
    """Let each half of the ranks compute one pass of each step; generations must have two passes.

    Raises:
        ValueError: The number of ranks is odd.
    """
    if dist.get_world_size() % 2:
        raise ValueError(
            f"two groups of ranks share guidance, got {dist.get_world_size()} ranks; use an even "
            "number."
        )
    setattr(pipe.transformer, _ATTRIBUTE, True)


@contextlib.contextmanager
def guidance_split(transformer: Any) -> Iterator[GuidanceSplit | None]:
    """Share the passes of one generation; yields None without `enable_guidance_split`."""
    if not getattr(transformer, _ATTRIBUTE, False):
        yield None
        return
    split, real = GuidanceSplit(), transformer.forward

    def forward(*args: Any, **options: Any) -> tuple[Tensor]:
        return split.forward(real, transformer.config, *args, **options)

    # With offloading, the pipeline replaces `forward` itself meanwhile.
    with replaced(transformer, "forward", forward):
        yield split


def _computed(ours: ForwardRun, theirs: ForwardRun) -> ForwardRun:
    """Of two records of a pass, the one whose layers ran."""
    return theirs if all(layer.state == "skipped" for layer in ours.layers) else ours
