"""Ways to have no room for a file: a disk that is full, and a limit on the size of files."""

import contextlib
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

KINDS = ("full disk", "file size limit")


@contextlib.contextmanager
def no_room(kind: str, folder: Path) -> Iterator[None]:
    """Within it nothing more fits into a folder of `small_disk`."""
    if kind == "full disk":
        filler = folder / "filler"
        with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
            while file.write(bytes(512)):
                pass
        yield
        filler.unlink()
    else:
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4, hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@contextlib.contextmanager
def small_disk(kind: str, folder: Path) -> Iterator[Path]:
    """A folder for `no_room`: a file system of 64 KiB of its own where the disk is to be full."""
    if sys.platform == "win32":
        pytest.skip("needs POSIX limits")
    folder.mkdir()
    if kind != "full disk":
        yield folder
        return
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("cannot mount a small file system here; it takes root")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)
