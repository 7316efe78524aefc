"""`python -m xattn_video.cli`, for when the script `xattn-video` is not on the path."""

from xattn_video.cli import main

main()
