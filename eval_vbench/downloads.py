"""Downloads the weights that VBench needs, each with its checksum."""

import shutil
import subprocess
import tempfile
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable, Iterable
from http.client import HTTPException
from pathlib import Path

from eval_vbench.preflight import HUGGING_FACE_HOME, NEEDS, Weights, is_there
from xattn_video.files import atomic_path, read_record, write_json
from xattn_video.pipelines.item_folder import file_digest

CHECKSUMS = "checksums.json"
_SECONDS = 30


class DownloadError(RuntimeError):
    """Weights could not be downloaded, or have a wrong size or checksum."""


def download_weights(dimensions: Iterable[str], folder: Path, say: Callable[[str], None]) -> None:
    """Download the weights that these dimensions lack, and check those of earlier downloads.

    The checksum of a file is compared with the one that its source states, in its address or in
    the answer of the Hugging Face hub. If none is stated, that of the first download counts. All
    are kept in checksums.json.

    Args:
        dimensions: VBench's names of the dimensions.
        folder: The folder of the weights.
        say: Function that prints a line.

    Raises:
        DownloadError: Some weights could not be downloaded, or were changed since.
    """
    wanted = {entry.path: entry for name in dimensions for entry in NEEDS[name].weights}
    failed = 0
    for entry in wanted.values():
        try:
            say(f"{entry.path}: {_provide(entry, folder)}")
        except (OSError, HTTPException, ValueError, RuntimeError, subprocess.SubprocessError) as e:
            say(f"failed: {entry.path}: {' '.join(str(e).split())}; from {entry.source}")
            failed += 1
    if failed:
        raise DownloadError(
            f"{failed} of {len(wanted)} weights could not be downloaded, as listed above; "
            "the others are "
            f"in {str(folder)!r}. Put these where the list says, or run the same command again."
        )


def _provide(entry: Weights, folder: Path) -> str:
    """Download an entry unless it exists; returns a line with its checksum and who states it."""
    place = folder / entry.path
    sums = read_record(folder / CHECKSUMS) or {}
    if is_there(place):
        if place.is_dir() or entry.path not in sums:
            return "is there"
        if file_digest(place) != sums[entry.path]:
            raise DownloadError("differs from the downloaded file; remove it")
        return f"is there, sha256 {sums[entry.path]} as downloaded"
    place.parent.mkdir(parents=True, exist_ok=True)
    if not entry.source.startswith("https://"):
        return _run(entry, folder)
    stated = entry.sha256 or _stated_by_the_hub(entry.source)
    digest = _fetch(entry.source, place, stated)
    _note(folder, entry.path, digest)
    return f"fetched, sha256 {digest} {'as published' if stated else '(no checksum published)'}"


def _fetch(address: str, place: Path, stated: str) -> str:
    """Download a file to a path and return its checksum."""
    with (
        urllib.request.urlopen(address, timeout=_SECONDS) as answer,
        atomic_path(place) as temporary,
    ):
        try:
            with temporary.open("r+b") as output:
                shutil.copyfileobj(answer, output, 2**20)
        except (TimeoutError, ConnectionError) as error:
            # These are failures to read; other system errors are failures to write.
            raise DownloadError(f"was cut short: {error}") from error
        expected = answer.headers.get("Content-Length")
        size = temporary.stat().st_size
        if size == 0 or (expected is not None and size != int(expected)):
            raise DownloadError(f"was truncated, got {size} of {expected} bytes")
        digest = file_digest(temporary)
        if not digest.startswith(stated):
            raise DownloadError(f"has sha256 {digest}, expected {stated}")
    return digest


def _stated_by_the_hub(address: str) -> str:
    """The checksum that the Hugging Face hub states for a large file; "" if there is none."""
    if not address.startswith("https://huggingface.co/"):
        return ""
    request = urllib.request.Request(address, method="HEAD")
    try:
        with urllib.request.build_opener(_NoRedirect).open(request, timeout=_SECONDS) as answer:
            headers = answer.headers
    except urllib.error.HTTPError as error:
        headers = error.headers
    stated = str(headers.get("X-Linked-Etag", "")).strip('"')
    return stated if len(stated) == 64 else ""


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Does not follow the hub's redirect, whose answer states the checksum."""

    def redirect_request(self, *args: object, **options: object) -> None:
        return None


def _run(entry: Weights, folder: Path) -> str:
    """Provide an entry whose source is a command; returns a line with its checksum."""
    command, *_, last = entry.source.split()
    place = folder / entry.path
    if command == "git":
        home = place.parent
        subprocess.run(["git", "clone", "--quiet", "--depth", "1", last, str(home)], check=True)
        done = subprocess.run(
            ["git", "-C", str(home), "rev-parse", "HEAD"],
            capture_output=True,
            text=True,
            check=True,
        )
        return f"fetched, git commit {done.stdout.strip()}"
    if command == "unzip":
        with tempfile.TemporaryDirectory(dir=folder, prefix=".download-") as temporary:
            archive = Path(temporary, "archive.zip")
            _fetch(last, archive, entry.sha256)
            with zipfile.ZipFile(archive) as members:
                member = next(name for name in members.namelist() if name.endswith(place.name))
                unpacked = Path(members.extract(member, temporary))
            unpacked.replace(place)
        digest = file_digest(place)
        _note(folder, entry.path, digest)
        return f"fetched, sha256 {digest} (no checksum published)"
    from huggingface_hub import snapshot_download

    # huggingface_hub checks the hub's checksums itself.
    name = entry.source.split()[2]
    snapshot_download(name, cache_dir=str(folder / HUGGING_FACE_HOME / "hub"))
    return "fetched, checked by huggingface_hub"


def _note(folder: Path, path: str, digest: str) -> None:
    sums = read_record(folder / CHECKSUMS) or {}
    write_json(folder / CHECKSUMS, sums | {path: digest})
