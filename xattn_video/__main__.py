"""Entry point of `python -m xattn_video` and of the script `xattn-video`."""

import sys
from importlib.util import find_spec

# Packages that the command line needs and the operator does not, of the extra `video`.
_VIDEO_PACKAGES = (
    "accelerate",
    "diffusers",
    "imageio",
    "imageio_ffmpeg",
    "numpy",
    "psutil",
    "rich",
    "safetensors",
    "transformers",
    "typer",
)


def main() -> None:
    """Run the command line, or print one line that says what to install for it."""
    missing = [name for name in _VIDEO_PACKAGES if find_spec(name) is None]
    if missing:
        sys.exit(
            f"error: the command line needs {', '.join(missing)}, not installed here; "
            "pip install 'xattn-video[video]' (in a clone: pip install -e '.[video]')."
        )
    from xattn_video.cli import main as run

    run()


if __name__ == "__main__":
    main()
