"""Measures a video against its reference, and says what cannot be measured."""

import tempfile
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

import numpy as np
import torch

from xattn_video.measure.clips import Clip, check_pair
from xattn_video.measure.frames import require_torchmetrics, score_frames
from xattn_video.measure.lpips import lpips, lpips_missing
from xattn_video.measure.vmaf import vmaf, vmaf_missing
from xattn_video.pipelines.video import write_video

VMAF_LEFT_OUT = (
    "the videos have almost no detail, and VMAF then counts invisible differences as lost detail; "
    "PSNR and SSIM remain valid."
)
# A block of 8x8 pixels is plain if its luma, of 255, has a smaller standard deviation. A video is
# plain if at least this share of its blocks is; the demo model's videos have 0.8 and more.
_PLAIN_DEVIATION, _PLAIN_SHARE = 2.0, 0.75
_SEEN_FRAMES = 9


@dataclass(frozen=True, slots=True)
class Similarity:
    """How similar a video is to its reference.

    Attributes:
        psnr, ssim: Means over the frames.
        lowest_psnr: PSNR of the frame that differs most.
        num_frames: Number of frames compared.
        num_identical: Number of frames that equal the reference's, bit for bit.
        vmaf: VMAF from ffmpeg; None if it was not measured.
        vmaf_self: VMAF of the reference against itself; None if it was not measured.
        lpips: LPIPS; None if its weights are not on disk.
        plain: Whether the reference consists of plain areas, so that VMAF was omitted.
    """

    psnr: float
    ssim: float
    lowest_psnr: float
    num_frames: int
    num_identical: int
    vmaf: float | None = None
    vmaf_self: float | None = None
    lpips: float | None = None
    plain: bool = False

    @property
    def relative_vmaf(self) -> float | None:
        """VMAF in percent of the reference's score against itself."""
        if self.vmaf is None or not self.vmaf_self:
            return None
        return 100 * self.vmaf / self.vmaf_self


def is_plain(clip: Clip) -> bool:
    """Whether a video consists of plain areas, as the demo model's do but no camera's."""
    chosen = np.linspace(0, len(clip.frames) - 1, min(_SEEN_FRAMES, len(clip.frames))).round()
    luma = clip.frames[chosen.astype(int)] @ np.array([0.299, 0.587, 0.114], np.float32)
    frames, rows, columns = luma.shape[0], luma.shape[1] // 8, luma.shape[2] // 8
    # [F, rows, 8, columns, 8]
    blocks = luma[:, : rows * 8, : columns * 8].reshape(frames, rows, 8, columns, 8)
    return bool((blocks.std(axis=(2, 4)) < _PLAIN_DEVIATION).mean() >= _PLAIN_SHARE)


class Scorer:
    """Measures videos against one reference after another.

    Args:
        device: Where PSNR, SSIM and LPIPS are computed.
        use_ffmpeg: Whether ffmpeg may be run, which VMAF needs.

    Attributes:
        missing: {metric: why it cannot be measured here}.

    Raises:
        MissingPackageError: torchmetrics, which PSNR and SSIM need, cannot be used.
    """

    def __init__(self, device: torch.device | str = "cpu", *, use_ffmpeg: bool = True) -> None:
        require_torchmetrics()
        self._device = device
        no_vmaf = (
            vmaf_missing() if use_ffmpeg else "it needs ffmpeg, which was not used in this run."
        )
        reasons = {"VMAF": no_vmaf, "LPIPS": lpips_missing()}
        self.missing = {name: reason for name, reason in reasons.items() if reason is not None}
        self._reference: Clip | None = None
        self._vmaf_self: float | None = None

    def score(self, reference: Clip, candidate: Clip) -> Similarity:
        """Measure one video; what depends only on the reference is measured once.

        Raises:
            ValueError: The two differ in size, length or frame rate.
        """
        check_pair(reference, candidate)
        if reference is not self._reference:
            self._reference, self._vmaf_self = reference, None
        frames = score_frames(reference.frames, candidate.frames, self._device)
        has_vmaf, has_lpips = (name not in self.missing for name in ("VMAF", "LPIPS"))
        plain = is_plain(reference)
        vmaf_score = self._vmaf(reference, candidate) if has_vmaf and not plain else None
        return Similarity(
            psnr=mean(frames.psnr),
            ssim=mean(frames.ssim),
            lowest_psnr=min(frames.psnr),
            num_frames=len(frames.psnr),
            num_identical=frames.num_identical,
            vmaf=vmaf_score,
            vmaf_self=self._vmaf_self,
            lpips=lpips(reference.frames, candidate.frames, self._device) if has_lpips else None,
            plain=plain,
        )

    def _vmaf(self, reference: Clip, candidate: Clip) -> float:
        """VMAF from lossless files of both videos, cut to even sizes as 4:2:0 needs."""
        with tempfile.TemporaryDirectory() as folder:
            paths = Path(folder, "reference.mkv"), Path(folder, "candidate.mkv")
            for path, clip in zip(paths, (reference, candidate), strict=True):
                height, width = (size // 2 * 2 for size in clip.frames.shape[1:3])
                write_video(path, clip.frames[:, :height, :width], max(1, round(clip.fps)))
            if self._vmaf_self is None:
                self._vmaf_self = vmaf(paths[0], paths[0])
            return vmaf(*paths)
