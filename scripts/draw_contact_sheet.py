"""Draw a row of frames for each video, one row below the other.

python scripts/draw_contact_sheet.py $(ls -tr videos/*.mp4) --output demo.png
"""

import argparse

import imageio.v3 as iio
import torch

from demo_training.pictures import save_sheet
from xattn_video.files import check_output_path, user_path
from xattn_video.reporting.endings import run_script


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("videos", type=user_path, nargs="+")
    parser.add_argument("--output", type=user_path, required=True)
    arguments = parser.parse_args()
    check_output_path(arguments.output, (".png", ".jpg"))
    # [3, T, H, W]
    clips = [
        torch.from_numpy(iio.imread(video)).permute(3, 0, 1, 2) / 255 for video in arguments.videos
    ]
    sizes = [f"{clip.shape[3]}x{clip.shape[2]}" for clip in clips]
    if len(set(sizes)) > 1:
        raise ValueError(f"all videos must be of one size, got {', '.join(sizes)}.")
    save_sheet(clips, arguments.output)


if __name__ == "__main__":
    run_script(main)
