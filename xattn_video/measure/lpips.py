"""LPIPS (AlexNet) through torchmetrics, if the real AlexNet weights are on disk."""

import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from xattn_video.measure.frames import frame_chunks

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_WEIGHTS = "alexnet-owt-7be5be79.pth"


def lpips_missing() -> str | None:
    """Why LPIPS cannot be measured here; None if it can. Nothing is downloaded."""
    weights = Path(torch.hub.get_dir(), "checkpoints", _WEIGHTS)
    if not weights.is_file() or not weights.stat().st_size:
        # Results may be published, so the path of the home folder is hidden.
        shown = str(weights).replace(str(Path.home()), "~", 1)
        return (
            f"AlexNet's weights were not found at {shown}; "
            f"download https://download.pytorch.org/models/{_WEIGHTS} to that path."
        )
    try:
        import torchvision  # noqa: F401
    except ImportError:
        return "torchvision is not installed; install the version that matches this torch."
    except RuntimeError as error:
        return (
            f"torchvision fails to import ({error}); install the version that matches this torch."
        )
    return None


def lpips(
    reference: "NDArray[np.uint8]",
    candidate: "NDArray[np.uint8]",
    device: torch.device | str = "cpu",
) -> float:
    """Mean LPIPS over the frames, 0 for equal ones; call only if `lpips_missing()` is None."""
    metric = _metric(torch.device(device))
    metric.reset()
    with torch.inference_mode():
        for ours, theirs in frame_chunks(reference, candidate, device):
            metric.update(theirs, ours)
        return float(metric.compute())


@functools.cache
def _metric(device: torch.device) -> Any:
    """The metric, created once for each device because its network has 60 million weights."""
    from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

    return LearnedPerceptualImagePatchSimilarity(net_type="alex", normalize=True).to(device)
