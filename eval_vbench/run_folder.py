"""The folder of a run: its settings, its videos, and a record of each video, written last.

settings.json       what the videos depend on, and its hash
videos/             {prompt}-{i}.mp4 and nothing else: VBench reads this folder
lossless/           the same frames as ffv1, for PSNR and SSIM
items/              one JSON file for each finished video
failures/           one JSON file for each video that failed
scores/             one for each VBench dimension
fidelity/           PSNR, SSIM and the like against a dense run, one file for each video
unfinished/         videos that are being written
locks/              one file for each rank
"""

import hashlib
import json
import shutil
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from eval_vbench.prompts import VideoItem, choose_prompts, video_items
from xattn_video.files import write_json


class RunFolder:
    """Reads and writes one run.

    Args:
        path: The folder, which need not exist yet.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.videos = path / "videos"
        self.lossless = path / "lossless"
        self.scores = path / "scores"
        self._settings_file = path / "settings.json"
        self._items = path / "items"
        self._failures = path / "failures"
        self._unfinished = path / "unfinished"
        self._locks = path / "locks"

    def adopt(self, settings: dict[str, Any]) -> None:
        """Create the folder for these settings, or check that it belongs to them.

        Raises:
            ValueError: The folder belongs to other settings, or holds something else.
        """
        if not self._settings_file.exists():
            self._require_empty()
            self._create(settings)
        known = self.settings()
        different = describe_differences(known, settings)
        if different:
            raise ValueError(
                f"{str(self.path)!r} holds a run of other settings: {'; '.join(different)} "
                "(in the folder and requested); give another --run, or the same settings."
            )

    def settings(self) -> dict[str, Any]:
        """The run's settings.

        Raises:
            ValueError: The folder holds no run, or its settings were edited.
        """
        try:
            content = json.loads(self._settings_file.read_text(encoding="utf-8"))
            settings, stated = content["settings"], content["hash"]
        except FileNotFoundError:
            raise ValueError(
                f"{str(self.path)!r} is no run: it has no settings.json; "
                "make one with python -m eval_vbench.generate."
            ) from None
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(
                f"{self._settings_file} is not what eval_vbench.generate writes ({error}); "
                "restore it, or start a run in another folder."
            ) from None
        if settings_hash(settings) != stated:
            raise ValueError(
                f"{self._settings_file} was changed: its hash does not fit its settings; "
                "restore it, or start a run in another folder."
            )
        return settings

    def expected_items(self) -> list[VideoItem]:
        """Every video of the run according to its settings."""
        settings = self.settings()
        prompts = choose_prompts(settings["suite"], settings["num_prompts"])
        return video_items(prompts, settings["videos_per_prompt"], settings["seed"])

    @contextmanager
    def lock(self, rank: int, num_ranks: int) -> Iterator[None]:
        """Lock the place of a rank; the system unlocks it however the process ends.

        Raises:
            ValueError: Another process holds the lock.
        """
        self._locks.mkdir(parents=True, exist_ok=True)
        with ExitStack() as held:
            try:
                held.enter_context(FileLock(self._locks / f"rank-{rank}", timeout=0))
            except Timeout:
                raise ValueError(
                    f"another process is generating into {str(self.path)!r} already; "
                    "wait for it, or use several GPUs with accelerate launch."
                ) from None
            self._discard_unfinished(rank, num_ranks)
            yield

    def unfinished(self, rank: int, name: str) -> Path:
        """The place where a rank writes a video before it is finished."""
        folder = self._unfinished / str(rank)
        folder.mkdir(parents=True, exist_ok=True)
        return folder / name

    def video(self, item: VideoItem) -> Path:
        """The place of a video."""
        return self.videos / item.file_name

    def lossless_video(self, item: VideoItem) -> Path:
        """The place of the lossless copy of a video."""
        return self.lossless / f"{item.key}.mkv"

    def add(self, item: VideoItem, files: dict[Path, Path], record: dict[str, Any]) -> None:
        """Move finished files to their places, then write the record, which marks them as done.

        Args:
            item: The video.
            files: Unfinished file -> its place.
            record: The record of the video.
        """
        sums = {self._relative(place): _file_sum(file) for file, place in files.items()}
        for file, place in files.items():
            place.parent.mkdir(parents=True, exist_ok=True)
            file.replace(place)
        self._items.mkdir(exist_ok=True)
        identity = {"key": item.key, "prompt": item.prompt.name, "seed": item.seed}
        write_json(self._item_file(item), {**identity, "files": sums, **record})
        self._failure_file(item).unlink(missing_ok=True)

    def record(self, item: VideoItem) -> dict[str, Any] | None:
        """The record of a video; None unless it is done and its files have the right sizes."""
        try:
            record = json.loads(self._item_file(item).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        for name, stated in record["files"].items():
            file = self.path / name
            if not file.is_file() or file.stat().st_size != stated["bytes"]:
                return None
        return record

    def add_failure(self, item: VideoItem, error: Exception) -> None:
        """Record that a video failed."""
        self._failures.mkdir(exist_ok=True)
        write_json(
            self._failure_file(item),
            {"key": item.key, "prompt": item.prompt.name, "error": describe_error(error)},
        )

    def forget_failures(self, items: Iterable[VideoItem]) -> None:
        """Remove the records of failures before the videos are tried again."""
        for item in items:
            self._failure_file(item).unlink(missing_ok=True)

    def failure(self, item: VideoItem) -> str | None:
        """Why a video failed; None if it did not."""
        try:
            return json.loads(self._failure_file(item).read_text(encoding="utf-8"))["error"]
        except FileNotFoundError:
            return None

    def _require_empty(self) -> None:
        """Refuse a folder with other files, which would be taken for the run's own."""
        found = sorted(file.name for file in self.videos.glob("*")) if self.path.exists() else []
        if found:
            raise ValueError(
                f"{str(self.videos)!r} holds {len(found)} files but {str(self.path)!r} has no "
                f"settings.json, so nobody knows what made them (such as {found[0]!r}); "
                "give an empty folder."
            )

    def _create(self, settings: dict[str, Any]) -> None:
        """Write the settings unless another rank did; a link appears completely or not at all."""
        self.path.mkdir(parents=True, exist_ok=True)
        content = {"hash": settings_hash(settings), "settings": settings}
        with suppress(FileExistsError):
            write_json(self._settings_file, content, new=True)

    def _discard_unfinished(self, rank: int, num_ranks: int) -> None:
        """Remove files of killed processes: this rank's own, and on rank 0 those of old ranks."""
        shutil.rmtree(self._unfinished / str(rank), ignore_errors=True)
        if rank == 0 and self._unfinished.is_dir():
            for folder in self._unfinished.iterdir():
                if int(folder.name) >= num_ranks:
                    shutil.rmtree(folder, ignore_errors=True)

    def _relative(self, path: Path) -> str:
        return path.relative_to(self.path).as_posix()

    def _item_file(self, item: VideoItem) -> Path:
        return self._items / f"{item.key}.json"

    def _failure_file(self, item: VideoItem) -> Path:
        return self._failures / f"{item.key}.json"


def settings_hash(settings: dict[str, Any]) -> str:
    """The same for equal settings, whatever their order."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def describe_differences(ours: dict[str, Any], theirs: dict[str, Any]) -> list[str]:
    """One entry for each setting that differs, such as "seed 0 and 1"."""
    found = []
    for name in dict.fromkeys((*ours, *theirs)):
        first, second = ours.get(name), theirs.get(name)
        if isinstance(first, dict) and isinstance(second, dict):
            found += describe_differences(first, second)
        elif first != second:
            found.append(f"{name} {_plain(first)} and {_plain(second)}")
    return found


def describe_error(error: Exception) -> str:
    """One line, with the kind of error."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def file_digest(path: Path) -> str:
    """SHA-256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(2**20):
            digest.update(chunk)
    return digest.hexdigest()


def _file_sum(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": file_digest(path)}


def _plain(value: object) -> str:
    return "none" if value is None else json.dumps(value)
