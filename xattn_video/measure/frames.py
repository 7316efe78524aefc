"""PSNR and SSIM of raw RGB frames through torchmetrics: per frame, then the mean."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from xattn_video.errors import MissingPackageError

MAX_PSNR = 100.0
"""The PSNR in dB of an identical frame, instead of infinity."""

_CHUNK_FRAMES = 8


@dataclass(frozen=True, slots=True)
class FrameScores:
    """The similarity of each frame to the reference's.

    Attributes:
        psnr: PSNR of each frame in dB, over its RGB values, at most `MAX_PSNR`.
        ssim: SSIM of each frame: Gaussian window of 11 pixels, sigma 1.5, mean over RGB.
        num_identical: Number of frames that equal the reference's, bit for bit.
    """

    psnr: tuple[float, ...]
    ssim: tuple[float, ...]
    num_identical: int


def require_torchmetrics() -> None:
    """Check that torchmetrics can be used.

    Raises:
        MissingPackageError: It is not installed, or torchvision belongs to another torch.
    """
    try:
        import torchmetrics.functional.image  # noqa: F401
    except ImportError:
        raise MissingPackageError(
            "PSNR and SSIM need torchmetrics, which is not installed; pip install torchmetrics."
        ) from None
    except RuntimeError as error:
        # It imports torchvision if installed, which fails if that is built for another torch.
        raise MissingPackageError(
            f"PSNR and SSIM need torchmetrics, which fails to import: {error}; "
            "install the torchvision that matches this torch, or uninstall it."
        ) from None


def score_frames(
    reference: NDArray[np.uint8],
    candidate: NDArray[np.uint8],
    device: torch.device | str = "cpu",
) -> FrameScores:
    """Compare two videos of the same shape.

    Args:
        reference: uint8 `[T, H, W, 3]`.
        candidate: Likewise.
        device: The device to compute on.

    Raises:
        ValueError: The shapes differ.
        MissingPackageError: torchmetrics cannot be used.
    """
    require_torchmetrics()
    from torchmetrics.functional.image import (
        peak_signal_noise_ratio,
        structural_similarity_index_measure,
    )

    if reference.shape != candidate.shape:
        raise ValueError(
            "the videos must have one shape, got reference "
            f"{list(reference.shape)} and candidate {list(candidate.shape)}."
        )
    psnr: list[float] = []
    ssim: list[float] = []
    identical = 0
    for ours, theirs in frame_chunks(reference, candidate, device):
        ratios = peak_signal_noise_ratio(
            theirs, ours, data_range=1.0, dim=(1, 2, 3), reduction="none"
        )
        psnr += ratios.clamp(max=MAX_PSNR).tolist()
        # With four dimensions it is computed by frame; with five it would span space and time.
        similarities = structural_similarity_index_measure(
            theirs, ours, data_range=1.0, reduction="none"
        )
        assert isinstance(similarities, Tensor)
        equal = (ours == theirs).flatten(1).all(dim=1)
        # Rounding loses the variance of plain areas, so that equal frames would score 0.9999.
        ssim += similarities.reshape(-1).masked_fill(equal, 1.0).tolist()
        identical += int(equal.sum())
    return FrameScores(tuple(psnr), tuple(ssim), identical)


def frame_chunks(
    reference: NDArray[np.uint8], candidate: NDArray[np.uint8], device: torch.device | str
) -> Iterator[tuple[Tensor, Tensor]]:
    """A few frames of both videos at a time, float32 `[F, 3, H, W]` in 0 to 1."""
    for start in range(0, len(reference), _CHUNK_FRAMES):
        chunk = slice(start, start + _CHUNK_FRAMES)
        ours, theirs = (
            torch.from_numpy(frames[chunk]).to(device).permute(0, 3, 1, 2).float() / 255
            for frames in (reference, candidate)
        )
        yield ours, theirs


def relative_error(reference: Tensor, candidate: Tensor) -> float:
    """Norm of the difference divided by the norm of the reference.

    Raises:
        ValueError: The shapes differ.
    """
    if reference.shape != candidate.shape:
        raise ValueError(
            "the latents must have one shape, got reference "
            f"{list(reference.shape)} and candidate {list(candidate.shape)}."
        )
    reference = reference.double()
    return float((candidate.double() - reference).norm() / reference.norm())
