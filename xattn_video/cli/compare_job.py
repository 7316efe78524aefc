"""Runs `xattn-video compare` after its arguments have been checked."""

import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from xattn_video.cli.compare_options import CompareDetails
from xattn_video.cli.compare_results import ResultsFolder, batch_key, check_new_results
from xattn_video.cli.outputs import ResumableFolder
from xattn_video.cli.page_file import PageWish, open_in_browser
from xattn_video.cli.record import run_record, shaping_record, typed_command
from xattn_video.errors import require_packages
from xattn_video.pipelines.item_folder import Attempts
from xattn_video.pipelines.request import GenerationRequest, check_fps, shorten_prompt
from xattn_video.pipelines.run_checks import check_runs
from xattn_video.pipelines.source import DEMO, is_on_hub
from xattn_video.reporting.console import (
    output_console,
    print_labelled,
    print_message,
    print_warnings,
    progress_console,
    quiet_libraries,
)
from xattn_video.reporting.endings import ErrorsToExitCodes
from xattn_video.reporting.progress import JobProgress

if TYPE_CHECKING:
    from xattn_video.measure.methods import Method
    from xattn_video.measure.similarity import Scorer
    from xattn_video.pipelines.loading import LoadOptions


@dataclass(frozen=True, slots=True)
class CompareJob:
    """One comparison.

    Attributes:
        load: How the model is loaded.
        requests: One dense request for each prompt and seed.
        methods: The methods to compare with dense attention.
        details: Other settings of what is generated, measured and written.
        page: Whether a web page is written, and opened.
        verbose: Whether to show the messages of other libraries.
        table: Whether the table is printed.
    """

    load: "LoadOptions"
    requests: tuple[GenerationRequest, ...]
    methods: "tuple[Method, ...]"
    details: CompareDetails
    page: PageWish
    verbose: bool
    table: bool = True

    def __post_init__(self) -> None:
        check_fps(self.details.fps)
        if self.details.batch_size < 1:
            raise ValueError(
                f"batch_size must be at least 1, got {self.details.batch_size}; use 1."
            )

    @property
    def folder(self) -> Path:
        """The folder of all results."""
        return self.details.output or Path("compare")

    def check(self) -> None:
        """Check for what would fail or have no effect, before the weights are loaded.

        Raises:
            ValueError, UnsupportedModelError, PipelineLoadError: The model or the folder cannot
                be used.
            BackendUnavailableError: The backend cannot run the model's heads here.
            MissingPackageError: torchmetrics, matplotlib or ffmpeg is needed and cannot be used.
        """
        from xattn_video.measure.frames import require_torchmetrics
        from xattn_video.pipelines.video import VIDEO_SUFFIXES, check_encoders

        require_packages("comparisons", "torchmetrics", "matplotlib")
        require_torchmetrics()
        if not ResumableFolder(self.folder).settings_file.exists():
            check_new_results(self.folder, self.details.overwrite)
        if self.details.videos:
            check_encoders(self.folder, VIDEO_SUFFIXES, self.details.fps)
        sparse = [method.sparse for method in self.methods if method.sparse is not None]
        requests = [replace(self.requests[0], sparse=settings) for settings in sparse]
        prompts = [request.prompt for request in self.requests]
        print_warnings(check_runs(self.load, requests, self.details.force, prompts))

    def settings(self) -> dict[str, Any]:
        """Everything that the results depend on, including the device for the times."""
        record = self._record()
        names = ("device", "video", "negative_prompt", "seeds", "batch_size")
        return {
            **shaping_record(self.load, self.details.fps),
            **{name: record[name] for name in names},
            "prompts": list(dict.fromkeys(request.prompt for request in self.requests)),
            "methods": {
                method.name: None if method.sparse is None else method.sparse.to_dict()
                for method in self.methods
            },
            "videos": self.details.videos,
            "kept_mass": self.details.kept_mass,
        }

    def start(self, errors: ErrorsToExitCodes, as_json: bool = False) -> None:
        """Check everything, then run in the folder, which is locked meanwhile."""
        self.check()
        folder = ResumableFolder(self.folder)
        with folder.lock():
            folder.adopt(self.settings(), self.details.overwrite)
            errors.running = True
            self.run(folder, as_json)

    def run(self, folder: ResumableFolder, as_json: bool = False) -> None:
        """Make what is missing in the folder, write the files, print the table or JSON.

        Raises:
            RuntimeError: At least one video failed.
        """
        from xattn_video.measure.methods import DENSE

        if not self.verbose:
            quiet_libraries()
        results = ResultsFolder(
            folder, (DENSE, *self.methods), self.details.videos, self.page.html, self._record()
        )
        missing = {first: batch for first, batch in self._batches() if not results.resume(first)}
        count = sum(len(batch) for batch in missing.values())
        total = len(self.requests)
        if count < total:
            print_message(f"{total - count} of {total} prompts and seeds are already done")
        folder.forget_failures(batch_key(first) for first in missing)
        attempts = Attempts(folder, print_message)
        if missing:
            self._generate(missing, results, attempts)
        if results.rows:
            self._print(results, results.finish(), as_json)
            if self.page.open:
                open_in_browser(results.page)
        attempts.conclude(len(missing))

    def _print(self, results: ResultsFolder, lines: dict[str, str], as_json: bool) -> None:
        """Print the table and labelled lines, or JSON."""
        from xattn_video.measure.comparison_rows import comparison_table

        if as_json:
            rows = [row.to_dict() for row in results.rows]
            typer.echo(json.dumps({"results": str(self.folder), "rows": rows}, indent=2))
            return
        console = output_console()
        if self.table:
            table = comparison_table(results.rows)
            console.print(table.terminal(console.width), crop=False)
        print_labelled(console, lines)

    def _generate(
        self,
        missing: dict[int, tuple[GenerationRequest, ...]],
        results: ResultsFolder,
        attempts: Attempts,
    ) -> None:
        """Generate and measure what is missing, with one progress display."""
        from xattn_video.measure.similarity import Scorer

        scorer = Scorer(self.load.resolved_device, use_ffmpeg=self.details.videos)
        for name, why in scorer.missing.items():
            print_message(f"{name} is not measured: {why}")
        with JobProgress(progress_console()).running() as shown:
            self._measure_missing(missing, results, attempts, scorer, shown)

    def _measure_missing(
        self,
        missing: dict[int, tuple[GenerationRequest, ...]],
        results: ResultsFolder,
        attempts: Attempts,
        scorer: "Scorer",
        shown: JobProgress,
    ) -> None:
        """Load the model and measure with it."""
        from xattn_video.measure.comparison import Comparison, judge_demo_clip
        from xattn_video.pipelines.expected_work import ExpectedWork
        from xattn_video.pipelines.loading import load_pipeline
        from xattn_video.pipelines.prompt_length import cut_prompts

        shown.load(self.load.model, downloads=is_on_hub(self.load.model))
        pipe = load_pipeline(self.load)
        pipe.set_progress_bar_config(disable=True)
        print_warnings(cut_prompts(pipe, self.requests))
        judge = judge_demo_clip if self.load.model == DEMO else None
        comparison = Comparison(pipe, self.methods, scorer, self.details.fps, judge)
        shown.left.decoding_steps = ExpectedWork.of(pipe).decoding_steps(self.requests[0].video)
        for first, batch in missing.items():
            kept_mass = self.details.kept_mass and first == 1
            shown.expect(comparison.expected(batch, measure_kept_mass=kept_mass))
        comparison.warm_up(self.requests[: self.details.batch_size], shown.run)
        for first, batch in missing.items():
            title = f"{first}/{len(self.requests)} {shorten_prompt(batch[0].prompt, 40)}"
            progress = partial(shown.run, prefix=f"{title}: ")
            with attempts.item(batch_key(first), title):
                for outcomes in comparison.run(
                    batch, progress, measure_kept_mass=self.details.kept_mass and first == 1
                ):
                    results.add(first, outcomes, scorer.missing)
                results.finish_batch(first)

    def _batches(self) -> Iterator[tuple[int, tuple[GenerationRequest, ...]]]:
        """The batches of requests generated together, each after its first number, from 1."""
        for first in range(0, len(self.requests), self.details.batch_size):
            yield first + 1, self.requests[first : first + self.details.batch_size]

    def _record(self) -> dict[str, Any]:
        """The part of results.json that all videos share."""
        from xattn_video.pipelines.model_shape import read_model_shape
        from xattn_video.pipelines.source import find_model

        video = self.requests[0].video
        shape = read_model_shape(find_model(self.load.model))
        return {
            "command": typed_command(),
            **run_record(self.load, self.details.fps),
            "video": asdict(video),
            "video_tokens": math.prod(shape.grid(video.height, video.width, video.num_frames)),
            "negative_prompt": self.requests[0].negative_prompt,
            "num_prompts": len({request.prompt for request in self.requests}),
            "seeds": list(dict.fromkeys(request.seed for request in self.requests)),
            "batch_size": self.details.batch_size,
        }
