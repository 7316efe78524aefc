"""Two videos and their difference side by side, with labels."""

from typing import TYPE_CHECKING

import numpy as np

from xattn_video.measure.clips import Clip, check_pair

if TYPE_CHECKING:
    from numpy.typing import NDArray

GAIN = 4
"""Factor by which differences are brightened."""
_GAP = 4
_BAR_HEIGHT = 24
_FONT_SIZES = range(15, 5, -1)


def side_by_side(
    reference: Clip, candidate: Clip, reference_label: str, candidate_label: str
) -> "NDArray[np.uint8]":
    """Reference, candidate and four times their absolute difference, left to right, labelled.

    Returns:
        uint8 `[T, H', W', 3]`, H' and W' even.

    Raises:
        ValueError: The two differ in size, length or frame rate.
    """
    check_pair(reference, candidate)
    ours, theirs = reference.frames, candidate.frames
    difference = amplified_difference(ours, theirs)
    num_frames, height, width = ours.shape[:3]
    gap = np.zeros((num_frames, height, _GAP, 3), np.uint8)
    pictures = np.concatenate([ours, gap, theirs, gap, difference], axis=2)
    labels = (reference_label, candidate_label, f"difference x{GAIN}")
    bar = _label_bar(width, labels)
    width = pictures.shape[2]
    canvas = np.zeros((num_frames, _even(_BAR_HEIGHT + height), _even(width), 3), np.uint8)
    canvas[:, :_BAR_HEIGHT, :width] = bar
    canvas[:, _BAR_HEIGHT : _BAR_HEIGHT + height, :width] = pictures
    return canvas


def amplified_difference(
    reference: "NDArray[np.uint8]", candidate: "NDArray[np.uint8]"
) -> "NDArray[np.uint8]":
    """`GAIN` times the absolute difference of two videos of one shape."""
    change = np.maximum(reference, candidate) - np.minimum(reference, candidate)
    # Capped, because the product of larger differences would overflow a byte.
    return (np.minimum(change, 255 // GAIN) * GAIN).astype(np.uint8)


def _label_bar(width: int, labels: tuple[str, ...]) -> "NDArray[np.uint8]":
    """A bar with a label for each picture, `[_BAR_HEIGHT, W, 3]`."""
    from PIL import Image, ImageDraw, ImageFont

    bar = np.zeros((_BAR_HEIGHT, (width + _GAP) * len(labels) - _GAP, 3), np.uint8)
    for number, label in enumerate(labels):
        # Each label has its own image, so that a long one does not run into the next.
        image = Image.new("RGB", (width, _BAR_HEIGHT))
        draw = ImageDraw.Draw(image)
        font = ImageFont.load_default(_FONT_SIZES[-1])
        for size in _FONT_SIZES:
            larger = ImageFont.load_default(size)
            if draw.textlength(label, font=larger) <= width - 8:
                font = larger
                break
        draw.text((4, _BAR_HEIGHT // 2), label, fill="white", font=font, anchor="lm")
        start = number * (width + _GAP)
        bar[:, start : start + width] = np.asarray(image)
    return bar


def _even(size: int) -> int:
    """The size rounded up to an even number, as H.264 with 4:2:0 needs."""
    return size + size % 2
