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
    """Keeps every outcome as it comes, so that a run cut short leaves what it did.

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
        """One for each method."""
        from xattn_video.measure.comparison_rows import summarise

        return summarise(self._measurements)

    def add(self, first: int, outcomes: "Sequence[Outcome]") -> None:
        """Write the videos of one method, and results.json anew.

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
            # It is much the same from prompt to prompt: the first ones stand for all.
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
        """A lossless copy, and for a sparse video one beside the dense one."""
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
    """Make sure that results can be written to a folder which holds none yet.

    Raises:
        ValueError: They cannot, or it does.
    """
    check_output_folder(folder)
    if (folder / "results.json").exists():
        raise ValueError(
            f"{str(folder)!r} holds results.json already; choose another --output, or remove it."
        )
