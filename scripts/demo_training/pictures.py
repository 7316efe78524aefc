"""Contact sheets: a row of frames for each clip."""

from collections.abc import Sequence
from pathlib import Path

import torch.nn.functional as F
from PIL import Image
from torch import Tensor, cat, linspace

from xattn_video.files import atomic_path

COLUMNS = 8
ROW_HEIGHT = 112
# White pixels at the right of each frame and below it.
GUTTER = 3


def save_sheet(clips: Sequence[Tensor], path: Path) -> None:
    """Write clips ``[3, T, H, W]`` in [0, 1], all of the same size, as one picture."""
    rows = []
    for clip in clips:
        indices = linspace(0, clip.shape[1] - 1, COLUMNS).round().long()
        frames = clip[:, indices.to(clip.device)].transpose(0, 1).float()
        width = round(ROW_HEIGHT * clip.shape[3] / clip.shape[2])
        frames = F.interpolate(frames, (ROW_HEIGHT, width), mode="area")
        frames = F.pad(frames, (0, GUTTER, 0, GUTTER), value=1.0)
        rows.append(cat(list(frames), dim=2))
    picture = (cat(rows, dim=1).clamp(0, 1) * 255).byte().permute(1, 2, 0).cpu().numpy()
    with atomic_path(path) as temporary:
        Image.fromarray(picture).save(temporary)
