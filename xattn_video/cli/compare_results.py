"""The folder of a comparison: results.json and results.md, videos and plots."""

from collections.abc import Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xattn_video.cli.outputs import ResumableFolder, default_name
from xattn_video.files import check_output_path, write_json, write_text
from xattn_video.pipelines.video import write_video, write_video_or_keep_frames

if TYPE_CHECKING:
    from xattn_video.measure.comparison import Measurement, Outcome
    from xattn_video.measure.comparison_rows import MethodRow
    from xattn_video.measure.methods import Method


class ResultsFolder:
    """Writes every outcome as soon as it exists, so that an interrupted run keeps its results.

    Prompts and seeds that are generated together are one item of the folder.

    Args:
        folder: The folder, which holds only results of these settings.
        methods: The methods that are compared.
        videos: Whether videos are written.
        html: Whether the results are also written as a web page.
        common: The part of results.json that all videos share.
    """

    def __init__(
        self,
        folder: ResumableFolder,
        methods: "Sequence[Method]",
        videos: bool,
        html: bool,
        common: dict[str, Any],
    ) -> None:
        self.folder = folder.path
        self._items = folder
        self._methods = {method.name: method for method in methods}
        self._videos = videos
        self._html = html
        self._common = common
        self._batches: dict[int, dict[str, Any]] = {}

    @property
    def page(self) -> Path:
        """The path of the web page."""
        return self.folder / "results.html"

    @property
    def rows(self) -> "list[MethodRow]":
        """One row for each method."""
        from xattn_video.measure.comparison_rows import summarise

        return summarise(self._measurement(record) for record in self._records)

    @property
    def _records(self) -> list[dict[str, Any]]:
        """The records of all videos, in the order of their prompts and seeds."""
        return [record for _, batch in sorted(self._batches.items()) for record in batch["videos"]]

    def resume(self, first: int) -> bool:
        """Load a batch that an earlier run finished; returns whether there is one."""
        batch = self._items.record(batch_key(first))
        if batch is not None:
            self._batches[first] = batch
        return batch is not None

    def add(self, first: int, outcomes: "Sequence[Outcome]", missing: dict[str, str]) -> None:
        """Write the videos of one method, and rewrite results.json.

        Args:
            first: Number of the first video among all prompts and seeds, from 1.
            outcomes: The outcomes of a batch that was generated together.
            missing: {metric: why it cannot be measured}.
        """
        empty = {"videos": [], "layer_densities": {}, "missing": missing}
        batch = self._batches.setdefault(first, empty)
        from xattn_video.measure.methods import DENSE

        for number, outcome in enumerate(outcomes, first):
            files = self._write_videos(number, outcome) if self._videos else []
            measured = outcome.measurement
            record = asdict(replace(measured, method=DENSE)) | {"method": measured.method.name}
            record["prompt_tokens"] = [asdict(count) for count in outcome.result.prompt_tokens]
            record["files"] = [file.relative_to(self.folder).as_posix() for file in files]
            batch["videos"].append(record)
        report = outcomes[0].result.report
        if report is not None and report.sparse_steps:
            densities = report.layer_densities()
            batch["layer_densities"][outcomes[0].measurement.method.name] = densities
        self._write_json()

    def finish_batch(self, first: int) -> None:
        """Record a batch as finished by all methods."""
        batch = self._batches[first]
        files = [self.folder / name for record in batch["videos"] for name in record["files"]]
        self._items.add(batch_key(first), files, batch)

    def finish(self) -> dict[str, str]:
        """Draw the plots, write results.md and results.html, and return what to print."""
        from xattn_video.measure.comparison_page import comparison_text, comparison_title
        from xattn_video.measure.comparison_plots import write_plots
        from xattn_video.measure.comparison_web import comparison_web_page, single_verdict

        record = self._write_json()
        plots = write_plots(self.folder / "plot", self.rows, record["layer_densities"])
        text = comparison_text(record, [path.name for path in plots])
        write_text(self.folder / "results.md", f"# {comparison_title(record)}\n\n{text}")
        lines = {name: figure.line for name, figure in single_verdict(record).items()}
        if self._html:
            write_text(self.page, comparison_web_page(record, self.folder, plots).html())
            lines["page"] = str(self.page)
        return lines | {"results": str(self.folder)}

    def _write_json(self) -> dict[str, Any]:
        batches = [batch for _, batch in sorted(self._batches.items(), reverse=True)]
        records = self._records
        record = {
            **self._common,
            "missing": {name: why for b in batches for name, why in b["missing"].items()}
            | self._left_out(records),
            "backends": sorted({name for record in records for name in record["backends"]}),
            "rows": [row.to_dict() for row in self.rows],
            # Densities hardly differ between prompts, so the first batch represents all.
            "layer_densities": {k: v for b in batches for k, v in b["layer_densities"].items()},
            "videos": records,
        }
        write_json(self.folder / "results.json", record)
        return record

    @staticmethod
    def _left_out(records: list[dict[str, Any]]) -> dict[str, str]:
        """Metrics that are omitted because they would mislead, and why."""
        from xattn_video.measure.similarity import VMAF_LEFT_OUT

        found = [record["similarity"] for record in records if record["similarity"] is not None]
        plain = any(similarity.get("plain") for similarity in found)
        return {"VMAF": VMAF_LEFT_OUT} if plain else {}

    def _measurement(self, record: dict[str, Any]) -> "Measurement":
        """The measurement of a video, from its record."""
        from xattn_video.measure.comparison import Measurement
        from xattn_video.measure.similarity import Similarity

        values = {field.name: record[field.name] for field in fields(Measurement)}
        values["method"] = self._methods[record["method"]]
        values["backends"] = tuple(record["backends"])
        if record["similarity"] is not None:
            values["similarity"] = Similarity(**record["similarity"])
        return Measurement(**values)

    def _write_videos(self, number: int, outcome: "Outcome") -> list[Path]:
        """Write a lossless copy, and a sparse video next to its dense video."""
        from xattn_video.measure.side_by_side import side_by_side

        measurement = outcome.measurement
        name = f"{number:03}-{default_name(measurement.prompt, measurement.seed)}"
        folder = self.folder / "videos" / name
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


def batch_key(first: int) -> str:
    """The key of the batch whose first prompt and seed has this number."""
    return f"{first:03}"


def check_new_results(folder: Path, overwrite: bool) -> None:
    """Check that new results can be written to a folder.

    Raises:
        ValueError: The folder cannot be written, or it holds results and ``overwrite`` is False.
    """
    check_output_path(folder / "results.json", (".json",))
    if (folder / "results.json").exists() and not overwrite:
        raise ValueError(
            f"{str(folder)!r} already holds results.json; choose another --output, "
            "or give --overwrite."
        )
