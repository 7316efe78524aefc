"""The folder of a run: its settings, its videos, and a record of each, written after the video.

settings.json       the settings that the videos depend on, and their hash
videos/             {prompt}-{i}.mp4 and nothing else, because VBench reads this folder
lossless/           the same frames as ffv1, for PSNR and SSIM
items/              one JSON file for each finished video
failures/           one JSON file for each video that failed
scores/             one JSON file for each VBench dimension
fidelity/           PSNR, SSIM and others against a dense run, one file for each video
unfinished/         videos that are being written
locks/              one file for each rank
"""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from eval_vbench.prompts import VideoItem, choose_prompts, video_items
from xattn_video.pipelines.item_folder import ItemFolder


class RunFolder(ItemFolder):
    """Reads and writes one run.

    Args:
        path: The folder, which need not exist yet.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(
            path,
            path,
            "give another --run, or the same settings",
            ", or use several GPUs with accelerate launch",
        )
        self.videos = path / "videos"
        self.lossless = path / "lossless"
        self.scores = path / "scores"
        self._unfinished = path / "unfinished"

    def adopt(self, settings: dict[str, Any], overwrite: bool = False) -> None:
        """Assign these settings to a new folder, or check that the folder has them.

        Raises:
            ValueError: The folder has other settings, or contains other files.
        """
        self.check_adoption(settings, overwrite)
        super().adopt(settings, overwrite)

    def check_adoption(self, settings: dict[str, Any], overwrite: bool) -> None:
        """Raise ValueError if `adopt` would; writes nothing."""
        if not self.settings_file.exists():
            self._require_empty()
        elif not overwrite:
            self.check(settings)

    def settings(self) -> dict[str, Any]:
        """The run's settings.

        Raises:
            ValueError: The folder is not a run, or its settings were edited.
        """
        if not self.settings_file.exists():
            raise ValueError(
                f"{str(self.path)!r} is no run: it has no settings.json; "
                "make one with python -m eval_vbench.generate."
            )
        return super().settings()

    def expected_items(self) -> list[VideoItem]:
        """Every video of the run according to its settings."""
        settings = self.settings()
        prompts = choose_prompts(settings["suite"], settings["num_prompts"])
        return video_items(prompts, settings["videos_per_prompt"], settings["seed"])

    @contextmanager
    def lock_rank(self, rank: int, num_ranks: int) -> Iterator[None]:
        """Hold the lock of a rank.

        Raises:
            ValueError: Another process holds the lock.
        """
        with self.lock(f"rank-{rank}"):
            self._discard_unfinished(rank, num_ranks)
            yield

    def unfinished(self, rank: int, name: str) -> Path:
        """The path at which a rank writes a video before it is finished."""
        folder = self._unfinished / str(rank)
        folder.mkdir(parents=True, exist_ok=True)
        return folder / name

    def video(self, item: VideoItem) -> Path:
        """The final path of a video."""
        return self.videos / item.file_name

    def lossless_video(self, item: VideoItem) -> Path:
        """The final path of the lossless copy of a video."""
        return self.lossless / f"{item.key}.mkv"

    def add_video(self, item: VideoItem, files: dict[Path, Path], record: dict[str, Any]) -> None:
        """Move finished files to their final paths; the record, written last, completes a video.

        Args:
            item: The video.
            files: {unfinished file: its final path}.
            record: The record of the video.
        """
        for file, place in files.items():
            place.parent.mkdir(parents=True, exist_ok=True)
            file.replace(place)
        self.add(
            item.key, files.values(), {"prompt": item.prompt.name, "seed": item.seed} | record
        )

    def _require_empty(self) -> None:
        """Raise ValueError for a folder with other files, which would seem to be the run's own."""
        found = sorted(file.name for file in self.videos.glob("*")) if self.path.exists() else []
        if found:
            raise ValueError(
                f"{str(self.videos)!r} holds {len(found)} files but {str(self.path)!r} has no "
                f"settings.json, so their settings are unknown (such as {found[0]!r}); "
                "give an empty folder."
            )

    def _discard_unfinished(self, rank: int, num_ranks: int) -> None:
        """Remove files of killed processes: this rank's, and on rank 0 those of old ranks."""
        shutil.rmtree(self._unfinished / str(rank), ignore_errors=True)
        if rank == 0 and self._unfinished.is_dir():
            for folder in self._unfinished.iterdir():
                if int(folder.name) >= num_ranks:
                    shutil.rmtree(folder, ignore_errors=True)
