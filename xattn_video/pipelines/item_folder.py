"""A folder that several runs of one command fill; each run resumes where the last one ended.

settings.json  the settings that the files depend on, and their hash
items/         one JSON file for each finished item, written after the item's files
failures/      one JSON file for each failed item
replaced.json  the files of runs that are overwritten, until the first item is finished again
locks/         one lock file for each process that may write at the same time
"""

import errno
import hashlib
import json
import shutil
from collections.abc import Callable, Container, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from textwrap import shorten
from typing import Any

from filelock import FileLock, Timeout

from xattn_video.errors import FileNotWrittenError
from xattn_video.files import read_record, write_json

# A run stops after this many: once a GPU has failed, everything that follows fails too.
_FAILURES_IN_A_ROW = 3
_SHOWN_LENGTH = 200


class RunStoppedError(RuntimeError):
    """A run had to stop; finished items are kept."""


class ItemFolder:
    """Reads and writes the records of a folder's files.

    Args:
        path: The folder of the files; it need not exist yet.
        state: The folder of settings.json and the records.
        remedy: Advice for the message if the folder has other settings.
        shared: Text to add to the message if another process writes into the folder.
    """

    def __init__(self, path: Path, state: Path, remedy: str, shared: str = "") -> None:
        self.path = path
        self.failures = state / "failures"
        self.settings_file = state / "settings.json"
        self._state = state
        self._items = state / "items"
        self._replaced_file = state / "replaced.json"
        self._remedy = remedy
        self._shared = shared

    def adopt(self, settings: dict[str, Any], overwrite: bool = False) -> None:
        """Assign these settings to a new folder, or check that the folder has them.

        Args:
            settings: Everything that the files depend on.
            overwrite: Forget the items of earlier runs first, whatever their settings. Their
                files are removed once the first item is finished again: until then the model
                may turn out not to run.

        Raises:
            ValueError: The folder has other settings.
        """
        if overwrite:
            self._list_replaced()
            self.start_over(settings)
        if not self.settings_file.exists():
            # Another rank may have written them.
            with suppress(FileExistsError):
                self._write_settings(settings, new=True)
        self.check(settings)

    def check(self, settings: dict[str, Any]) -> None:
        """Raise ValueError if the folder has other settings than these; writes nothing."""
        if not self.settings_file.exists():
            return
        different = describe_differences(self.settings(), json.loads(json.dumps(settings)))
        if different:
            raise ValueError(
                f"{str(self.path)!r} holds a run with other settings: {'; '.join(different)} "
                f"(in the folder and requested); {self._remedy}."
            )

    def start_over(self, settings: dict[str, Any]) -> None:
        """Forget all items, and assign these settings to the folder; the items' files stay."""
        for folder in (self._items, self.failures):
            shutil.rmtree(folder, ignore_errors=True)
        self._write_settings(settings)

    def forget(self, keys: Iterable[str]) -> None:
        """Forget items; their files stay."""
        for key in keys:
            self._item_file(key).unlink(missing_ok=True)

    def has_settings(self, settings: dict[str, Any]) -> bool:
        """Whether the folder belongs to a run with these settings."""
        with suppress(ValueError):
            self.check(settings)
            return self.settings_file.exists()
        return False

    def settings(self) -> dict[str, Any]:
        """The run's settings.

        Raises:
            ValueError: The settings file is invalid or was changed by hand.
        """
        content = read_record(self.settings_file, "settings", "hash")
        if content is None:
            raise ValueError(
                f"{self.settings_file} is not a valid settings file; restore it, or start a run "
                "in another folder."
            )
        settings: dict[str, Any] = content["settings"]
        if settings_hash(settings) != content["hash"]:
            raise ValueError(
                f"{self.settings_file} was changed: its hash does not match its settings; "
                "restore it, or start a run in another folder."
            )
        return settings

    @contextmanager
    def lock(self, name: str = "run") -> Iterator[None]:
        """Hold a lock; the system releases it however the process ends.

        Raises:
            ValueError: Another process holds the lock.
        """
        locks = self._state / "locks"
        locks.mkdir(parents=True, exist_ok=True)
        with ExitStack() as held:
            try:
                held.enter_context(FileLock(locks / name, timeout=0))
            except Timeout:
                raise ValueError(
                    f"another process is generating into {str(self.path)!r} already; "
                    f"wait for it{self._shared}."
                ) from None
            yield

    def add(self, key: str, files: Iterable[Path], record: dict[str, Any]) -> None:
        """Record that an item is finished.

        Args:
            key: The key of the item.
            files: Its files, at their final paths.
            record: Values to store.
        """
        sums = {
            file.relative_to(self.path).as_posix(): {
                "bytes": file.stat().st_size,
                "sha256": file_digest(file),
            }
            for file in files
        }
        write_json(self._item_file(key), {"key": key, "files": sums, **record})
        self.forget_failures([key])
        self._remove_replaced(kept=sums)

    def record(self, key: str) -> dict[str, Any] | None:
        """The record of an item; None unless it is finished and its files are unchanged."""
        item = self._item_file(key)
        record = read_record(item, "key", "files")
        if record is None or record["key"] != key:
            return None
        written = item.stat().st_mtime_ns
        for name, stated in record["files"].items():
            file = self.path / name
            if not file.is_file() or file.stat().st_size != stated["bytes"]:
                return None
            # Digests of large files take long, so only a file changed later is read.
            if file.stat().st_mtime_ns > written and file_digest(file) != stated["sha256"]:
                return None
        return record

    def add_failure(self, key: str, name: str, error: Exception) -> None:
        """Record that an item failed."""
        content = {"key": key, "prompt": name, "error": describe_error(error)}
        write_json(self._failure_file(key), content)

    def forget_failures(self, keys: Iterable[str]) -> None:
        """Remove the failure records of items, before they are tried again."""
        for key in keys:
            self._failure_file(key).unlink(missing_ok=True)

    def failure(self, key: str) -> str | None:
        """Why an item failed; None if it did not."""
        file = self._failure_file(key)
        if not file.exists():
            return None
        return str((read_record(file, "error") or {"error": "unknown"})["error"])

    def _write_settings(self, settings: dict[str, Any], *, new: bool = False) -> None:
        content = {"hash": settings_hash(settings), "settings": settings}
        write_json(self.settings_file, content, new=new)

    def _records(self) -> Iterator[dict[str, Any]]:
        """The records of all items, whatever became of their files."""
        for item in self._items.glob("*.json"):
            record = read_record(item, "key", "files")
            if record is not None:
                yield record

    def _list_replaced(self) -> None:
        """List the files of all items, and those that are listed already."""
        listed = [read_record(self._replaced_file, "files"), *self._records()]
        names = [name for record in listed if record is not None for name in record["files"]]
        if names:
            write_json(self._replaced_file, {"files": names})

    def _remove_replaced(self, kept: Container[str]) -> None:
        """Remove the listed files of overwritten runs, except ``kept``."""
        for name in (read_record(self._replaced_file, "files") or {"files": ()})["files"]:
            if name not in kept:
                (self.path / name).unlink(missing_ok=True)
        self._replaced_file.unlink(missing_ok=True)

    def _item_file(self, key: str) -> Path:
        return self._items / f"{key}.json"

    def _failure_file(self, key: str) -> Path:
        return self.failures / f"{key}.json"


class Attempts:
    """Makes items one after another, continues after a failure, and stops if it is futile.

    Args:
        folder: The folder of the items.
        say: Function that prints a line.
    """

    def __init__(self, folder: ItemFolder, say: Callable[[str], None]) -> None:
        self.failed = 0
        self._folder = folder
        self._say = say
        self._in_a_row = 0
        self._last: Exception | None = None

    @contextmanager
    def item(self, key: str, name: str) -> Iterator[None]:
        """A context that makes one item; records the failure if it raises before it is finished.

        Raises:
            RunStoppedError: The disk is full, or several items failed in a row.
        """
        try:
            yield
            self._in_a_row = 0
        except (RuntimeError, OSError, ValueError, MemoryError) as error:
            if self._folder.record(key) is not None:
                # The item is finished, and its results could not be printed.
                raise
            _stop_if_full(error, self._folder.path)
            self._folder.add_failure(key, name, error)
            self.failed, self._in_a_row, self._last = self.failed + 1, self._in_a_row + 1, error
            self._say(f"failed: {name}: {describe_error(error)}")
            if self._in_a_row == _FAILURES_IN_A_ROW:
                raise RunStoppedError(
                    f"{self._in_a_row} videos failed in a row, the last with "
                    f"{describe_error(error)}; fix the cause, then run the same command again; "
                    "finished videos are kept."
                ) from error

    def conclude(self, total: int) -> None:
        """Raise RuntimeError if any of the ``total`` items failed."""
        if self.failed:
            raise RuntimeError(
                f"{self.failed} of {total} videos failed, as listed above and in "
                f"{self._folder.failures}; run the same command again to retry them; the "
                "others are kept."
            ) from self._last


def settings_hash(settings: dict[str, Any]) -> str:
    """A hash that is the same for equal settings, whatever the order of their keys."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def describe_differences(ours: dict[str, Any], theirs: dict[str, Any]) -> list[str]:
    """An entry for each setting that differs: "seed 0 and 1", or "tau0.9 absent and present"."""
    found = []
    for name in dict.fromkeys((*ours, *theirs)):
        first, second = ours.get(name), theirs.get(name)
        if isinstance(first, dict) and isinstance(second, dict):
            found += describe_differences(first, second)
        elif first != second:
            if name not in theirs:
                found.append(f"{name} present and absent")
            elif name not in ours:
                found.append(f"{name} absent and present")
            else:
                found.append(f"{name} {_plain(first)} and {_plain(second)}")
    return found


def describe_error(error: Exception) -> str:
    """The error in one line, with its kind."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def file_digest(path: Path) -> str:
    """SHA-256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(2**20):
            digest.update(chunk)
    return digest.hexdigest()


def _plain(value: object) -> str:
    text = "none" if value is None else json.dumps(value, ensure_ascii=False)
    return shorten(text, _SHOWN_LENGTH, placeholder=" ...")


def _stop_if_full(error: Exception, folder: Path) -> None:
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        # The path of the kept frames.
        more = f" {error.more}" if isinstance(error, FileNotWrittenError) and error.more else ""
        raise RunStoppedError(
            f"the disk of {str(folder)!r} is full; finished work is kept: free some space, "
            f"then run the same command again.{more}"
        ) from error
