"""The folder of a comparison: results.json and results.md, videos and plots."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xattn_video.cli.outputs import default_name
from xattn_video.files import check_output_folder, write_json, write_text
from xattn_video.pipelines.video import write_video, write_video_or_keep_frames

if TYPE_CHECKING:
    from xattn_video.measure.comparison import Outcome
    from xattn_video.measure.comparison_plots import Densities
    from xattn_video.measure.comparison_rows import MethodRow


class ResultsFolder:
    """Writes every outcome as soon as it exists, so that an interrupted run keeps its results.

    Args:
        folder: Exists, and holds no results.
        videos: Whether videos are written.
        common: What all videos share, for results.json.
    """

    def __init__(self, folder: Path, videos: bool, common: dict[str, Any]) -> None:
        self.folder = folder
        self._videos = videos
        self._common = common
        self._measurements: list[Any] = []
        self._records: list[dict[str, Any]] = []
        self._densities: dict[str, Densities] = {}

    @property
    def rows(self) -> "list[MethodRow]":
        """One row for each method."""
        from xattn_video.measure.comparison_rows import summarise

        return summarise(self._measurements)

    def add(self, first: int, outcomes: "Sequence[Outcome]") -> None:
        """Write the videos of one method, and rewrite results.json.

        Args:
            first: Number of the first of them among all prompts and seeds, from 1.
            outcomes: Generated together.
        """
        for number, outcome in enumerate(outcomes, first):
            files = self._write_videos(number, outcome) if self._videos else []
            record = asdict(outcome.measurement) | {"method": outcome.measurement.method.name}
            record["prompt_tokens"] = [asdict(count) for count in outcome.result.prompt_tokens]
            self._records.append(
                record | {"files": [str(file.relative_to(self.folder)) for file in files]}
            )
            self._measurements.append(outcome.measurement)
        report = outcomes[0].result.report
        if report is not None and report.sparse_steps:
            # It hardly differs between prompts, so the first ones are enough.
            name = outcomes[0].measurement.method.name
            self._densities.setdefault(name, report.layer_densities())
        self._write_json()

    def finish(self) -> None:
        """Draw the plots and write results.md."""
        from xattn_video.measure.comparison_page import comparison_text, comparison_title
        from xattn_video.measure.comparison_plots import write_plots

        record = self._write_json()
        plots = write_plots(self.folder / "plot", self.rows, self._densities)
        text = comparison_text(record, [path.name for path in plots])
        write_text(self.folder / "results.md", f"# {comparison_title(record)}\n\n{text}")

    def _write_json(self) -> dict[str, Any]:
        backends = {name for m in self._measurements for name in m.backends}
        record = {
            **self._common,
            "backends": sorted(backends),
            "rows": [asdict(row) for row in self.rows],
            "layer_densities": self._densities,
            "videos": self._records,
        }
        write_json(self.folder / "results.json", record)
        return record

    def _write_videos(self, number: int, outcome: "Outcome") -> list[Path]:
        """Write a lossless copy, and a sparse video next to its dense video."""
        from xattn_video.measure.side_by_side import side_by_side

        measurement = outcome.measurement
        name = f"{number:03}-{default_name(measurement.prompt, measurement.seed)}"
        folder = self.folder / "videos" / name
        check_output_folder(folder)
        files = [folder / f"{measurement.method.name}.mkv"]
        fps = round(outcome.clip.fps)
        write_video_or_keep_frames(files[0], outcome.clip.frames, fps)
        if measurement.method.sparse is not None:
            files.append(folder / f"{measurement.method.name}-side-by-side.mp4")
            frames = side_by_side(
                outcome.reference, outcome.clip, "dense", measurement.method.label
            )
            write_video(files[1], frames, fps)
        return files


def check_new_results(folder: Path) -> None:
    """Check that results can be written to the folder and that it holds none yet.

    Raises:
        ValueError: The folder cannot be written, or it holds results.
    """
    check_output_folder(folder)
    if (folder / "results.json").exists():
        raise ValueError(
            f"{str(folder)!r} already holds results.json; choose another --output, or remove it."
        )
