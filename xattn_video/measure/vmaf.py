"""VMAF through the libvmaf filter of imageio's ffmpeg, with the model built into it."""

import functools
import json
import subprocess
import tempfile
from pathlib import Path

_GRAPH = (
    "[0:v]setpts=PTS-STARTPTS,format=yuv420p[candidate];"
    "[1:v]setpts=PTS-STARTPTS,format=yuv420p[reference];"
    "[candidate][reference]libvmaf=log_fmt=json:log_path=vmaf.json"
)


@functools.cache
def vmaf_missing() -> str | None:
    """Why VMAF cannot be measured here; None if it can."""
    try:
        from imageio_ffmpeg import get_ffmpeg_exe

        filters = subprocess.run(
            [get_ffmpeg_exe(), "-hide_banner", "-filters"], capture_output=True, text=True
        ).stdout
    except (ImportError, OSError, RuntimeError) as error:
        return f"ffmpeg cannot be run ({error}); pip install imageio-ffmpeg."
    if " libvmaf " not in filters:
        return "this ffmpeg has no libvmaf filter; pip install --upgrade imageio-ffmpeg."
    return None


def vmaf(reference: Path, candidate: Path) -> float:
    """Mean VMAF of a video file against another of the same size and length.

    A video scores a little less than 100 even against itself, so divide by ``vmaf(r, r)``.

    Raises:
        RuntimeError: ffmpeg failed.
    """
    from imageio_ffmpeg import get_ffmpeg_exe

    command = [get_ffmpeg_exe(), "-hide_banner", "-loglevel", "error", "-nostdin"]
    command += ["-i", str(candidate.resolve()), "-i", str(reference.resolve())]
    command += ["-lavfi", _GRAPH, "-f", "null", "-"]
    # The filter has its own escaping rules, so it is not given a path that contains user input.
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(command, capture_output=True, text=True, cwd=folder)
        log = Path(folder, "vmaf.json")
        if done.returncode or not log.is_file():
            detail = " ".join(done.stderr.split()) or f"exit code {done.returncode}"
            raise RuntimeError(f"ffmpeg could not measure VMAF of {str(candidate)!r}: {detail}")
        score: float = json.loads(log.read_text())["pooled_metrics"]["vmaf"]["mean"]
    return score
