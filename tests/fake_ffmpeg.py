"""An ffmpeg that fails in one of many ways when it encodes a video, and otherwise works."""

from pathlib import Path

import pytest
from imageio_ffmpeg import get_ffmpeg_exe

# What it does in place of encoding; $out is the file, $real an ffmpeg that works.
FAULTS = {
    "says so at the end": 'cat >/dev/null; "$real" "$@" </dev/null; echo No more >&2; exit 7',
    "killed": "cat >/dev/null; kill -9 $$",
    "nothing written": "cat >/dev/null; : >$out",
    "no video": "cat >/dev/null; echo nonsense >$out",
    "one frame less": '"$real" "$@" -frames:v 8 && exit 0',
    "another picture": '"$real" "$@" -vf negate',
    "another size": '"$real" "$@" -s 32x32',
    "cut off": 'cat >$out.all; "$real" "$@" <$out.all; rm $out.all; truncate -s -200 $out',
}


def install(monkeypatch: pytest.MonkeyPatch, folder: Path, encode: str) -> Path:
    """Use this ffmpeg, in this process and in those it starts; its probe of 16x16 works."""
    real = get_ffmpeg_exe()
    script = folder / "ffmpeg"
    # Options come before the output, which is the last word.
    script.write_text(
        f"""#!/bin/bash
real={real}
case "$*" in
*"-s 16x16"*) exec "$real" "$@" ;;
*"-i - "*)
    file="${{!#}}"; out="${{file#file:}}"
    set -- "${{@:1:$#-1}}"
    real() {{ "{real}" "$@" "$file"; }}
    {encode.replace('"$real"', "real")}
    ;;
*) exec "$real" "$@" ;;
esac
"""
    )
    script.chmod(0o755)
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", str(script))
    return script
