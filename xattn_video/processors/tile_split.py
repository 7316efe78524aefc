"""VAE decoding over ranks: each decodes some tiles, then all blend them as one GPU does.

The autoencoder's own code cuts and blends. It runs twice: first to record the tiles that it gives
its decoder, then with the tiles that the ranks decoded.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch.distributed as dist
from torch import Tensor

from xattn_video.processors.replaced import replaced

_ATTRIBUTE = "_xattn_tiles"


def enable_tile_split(pipe: Any, group: Any = None) -> None:
    """Let ranks decode each video together, from the next one on.

    Args:
        pipe: The pipeline.
        group: The ranks, a `torch.distributed.ProcessGroup`; None means all.
    """
    setattr(pipe.vae, _ATTRIBUTE, (group,))


@contextlib.contextmanager
def tile_split(vae: Any) -> Iterator[None]:
    """Split the tiles of every decode call inside, if `enable_tile_split` was called."""
    if not hasattr(vae, _ATTRIBUTE):
        yield
        return
    real, (group,) = vae.decode, getattr(vae, _ATTRIBUTE)

    def decode(*args: Any, **options: Any) -> Any:
        return _decode(vae, group, lambda: real(*args, **options))

    with replaced(vae, "decode", decode):
        yield


def _decode(vae: Any, group: Any, real: Callable[[], Any]) -> Any:
    """The result of ``real`` with tiles decoded by all ranks."""
    tiles: list[Tensor] = []

    def note(tile: Tensor, *_: Any) -> Tensor:
        tiles.append(tile)
        return tile.new_empty(_decoded_shape(vae, tile))

    with (
        replaced(vae.decoder, "forward", note),
        replaced(vae, "blend_v", _keep),
        replaced(vae, "blend_h", _keep),
        replaced(vae, "blend_t", _keep),
    ):
        real()
    decoded = iter(_decode_tiles(vae, group, tiles))
    with replaced(vae.decoder, "forward", lambda *_: next(decoded)):
        return real()


def _decode_tiles(vae: Any, group: Any, tiles: list[Tensor]) -> list[Tensor]:
    """All tiles decoded, each by one rank."""
    owners = _owners([tile.numel() for tile in tiles], dist.get_world_size(group))
    decoded: list[Tensor] = []
    for tile, owner in zip(tiles, owners, strict=True):
        if owner == dist.get_rank(group):
            decoded.append(vae.decoder(tile).contiguous())
        else:
            decoded.append(tile.new_empty(_decoded_shape(vae, tile)))
    for pixels, owner in zip(decoded, owners, strict=True):
        dist.broadcast(pixels, group=group, group_src=owner)
    return decoded


def _owners(sizes: list[int], num_ranks: int) -> list[int]:
    """The rank of each tile: the largest first, each to the rank with the least so far."""
    loads, owners = [0] * num_ranks, [0] * len(sizes)
    for number in sorted(range(len(sizes)), key=lambda number: -sizes[number]):
        owners[number] = loads.index(min(loads))
        loads[owners[number]] += sizes[number]
    return owners


def _decoded_shape(vae: Any, tile: Tensor) -> tuple[int, ...]:
    """`[B, 3, T, H, W]` of a tile `[B, C, t, h, w]`."""
    B, _, frames, height, width = tile.shape
    time, side = vae.temporal_compression_ratio, vae.spatial_compression_ratio
    channels = vae.config.out_channels
    return B, channels, (frames - 1) * time + 1, height * side, width * side


def _keep(before: Tensor, tile: Tensor, extent: int) -> Tensor:
    """Replaces blending while tiles are only recorded."""
    return tile
