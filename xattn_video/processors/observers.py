"""Observers of the layers of a processor; add one to `XAttnProcessor.observers`."""

import torch
from torch import Tensor

from xattn_video.processors.recorder import AttendedLayer

_SAMPLED_ROWS = 32


class KeptMass:
    """Measures the kept mass: the softmax mass, over all valid keys, in the computed blocks.

    It is measured after every sparse layer on some rows of video tokens, drawn anew each time
    from a fixed seed. It slows the run; do not use it while measuring time.
    """

    def __init__(self) -> None:
        self._masses: list[Tensor] = []
        self._generator = torch.Generator().manual_seed(0)

    def __call__(self, seen: AttendedLayer) -> None:
        if seen.blocks is None:
            return
        layout = seen.forward.layout
        rows = torch.randint(layout.num_video_tokens, (_SAMPLED_ROWS,), generator=self._generator)
        device = seen.query.device
        masses = kept_mass(
            seen.query,
            seen.key[:, : max(layout.key_lengths)],
            seen.blocks.to_mask(),
            torch.tensor(layout.key_lengths, device=device),
            rows.to(device),
            seen.forward.settings.block_size,
        )
        self._masses.append(masses.mean(dim=(1, 2)))

    @property
    def means(self) -> list[float] | None:
        """The mean over layers, heads and rows for each item of the batch; waits for the device.

        None if nothing ran sparse.
        """
        if not self._masses:
            return None
        masses = torch.stack([mass.cpu() for mass in self._masses])
        found: list[float] = masses.mean(dim=0).tolist()
        return found


def kept_mass(
    query: Tensor,
    key: Tensor,
    block_mask: Tensor,
    key_lengths: Tensor,
    rows: Tensor,
    block_size: int,
) -> Tensor:
    """Softmax mass of the kept blocks in some rows, float32 `[B, H, R]`.

    Args:
        query: `[B, Sq, H, D]`.
        key: `[B, Sk, H, D]`, the valid ones first.
        block_mask: bool `[B, H, Nq, Nk]`.
        key_lengths: int64 `[B]`, valid keys of each item.
        rows: int64 `[R]`, query tokens.
        block_size: Tokens in a block.
    """
    q = query[:, rows].transpose(1, 2).float() * query.shape[-1] ** -0.5
    logits = q @ key.transpose(1, 2).transpose(2, 3).float()
    columns = torch.arange(key.shape[1], device=query.device)
    beyond = columns >= key_lengths[:, None]
    weights = logits.masked_fill(beyond[:, None, None], -torch.inf).softmax(dim=-1)
    kept = block_mask[:, :, rows // block_size][..., columns // block_size]
    return (weights * kept).sum(dim=-1)
