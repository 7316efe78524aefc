"""Runs `eval_vbench.generate` after its arguments have been checked."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from eval_vbench.launch import Share
from eval_vbench.prompts import (
    DEFAULT_SUITE,
    DEMO_SUITE,
    SUITES,
    VIDEOS_PER_PROMPT,
    Prompt,
    VideoItem,
    choose_prompts,
    video_items,
)
from eval_vbench.run_folder import RunFolder
from xattn_video.files import check_run_folder
from xattn_video.options.command import knob
from xattn_video.pipelines.item_folder import Attempts
from xattn_video.pipelines.job_ranks import JobRanks
from xattn_video.pipelines.request import GenerationRequest, VideoSettings, check_fps
from xattn_video.pipelines.run_checks import check_runs
from xattn_video.pipelines.source import DEMO, is_on_hub
from xattn_video.pipelines.video import check_encoders
from xattn_video.pipelines.work_split import WorkSplit
from xattn_video.policy.settings import SparseSettings
from xattn_video.reporting.console import (
    output_console,
    print_message,
    print_warnings,
    progress_console,
    quiet_libraries,
)
from xattn_video.reporting.progress import JobProgress

if TYPE_CHECKING:
    from diffusers import HunyuanVideoPipeline

    from xattn_video.pipelines.loading import LoadOptions


@dataclass(frozen=True, slots=True)
class RunOptions:
    """The options of the run."""

    run: Path = knob("Folder of the run; an existing run is resumed.", ...)
    suite: str | None = knob(
        f"Prompts: {', '.join(SUITES)}.",
        shown_default=f"{DEFAULT_SUITE}; demo for the demo model",
    )
    num_prompts: int | None = knob("Number of prompts of the suite.", shown_default="all")
    videos_per_prompt: int = knob(
        f"{' or '.join(map(str, VIDEOS_PER_PROMPT))}, as VBench requires.", 1
    )
    lossless: bool = knob("Keep lossless copies, which PSNR and SSIM need.", True)
    seed: int = knob("Base seed; the seed of every video is derived from it.", 0)
    fps: int = knob("Frames per second of the file.", 24)
    force: bool = knob("Run even if the memory seems too small.", False, "--force")
    overwrite: bool = knob(
        "Generate every video of the run again, even existing ones; with one process only.",
        False,
        "--overwrite",
    )
    gpus_per_video: int = knob(
        "Number of GPUs that generate each video together, one process each.", 1
    )


@dataclass(frozen=True, slots=True)
class SamplingJob:
    """One rank's part of a run.

    Attributes:
        run: The folder of the run.
        share: The part of the videos that this rank generates.
        load: How the model is loaded.
        asked: The options of the run.
        video, sparse: As in a request.
        verbose: Whether to show the messages of other libraries.
        ranks: All ranks of the run; by default only this one.
        team: The ranks that share each video with this one.
    """

    run: RunFolder
    share: Share
    load: "LoadOptions"
    asked: RunOptions
    video: VideoSettings
    sparse: SparseSettings | None
    verbose: bool
    ranks: JobRanks = field(default_factory=JobRanks)
    team: JobRanks = field(default_factory=JobRanks)

    def __post_init__(self) -> None:
        check_fps(self.asked.fps)

    @property
    def suite(self) -> str:
        """The name of the suite of prompts."""
        return self.asked.suite or (DEMO_SUITE if self.load.model == DEMO else DEFAULT_SUITE)

    @property
    def writes(self) -> bool:
        """Whether this rank writes the videos of its team."""
        return self.team.is_first_of_team

    @property
    def prompts(self) -> list[Prompt]:
        """All prompts of the run."""
        return choose_prompts(self.suite, self.asked.num_prompts)

    @property
    def items(self) -> list[VideoItem]:
        """All videos of the run, on all ranks."""
        return video_items(self.prompts, self.asked.videos_per_prompt, self.asked.seed)

    def check(self) -> None:
        """Check for what would fail; creates nothing.

        Raises:
            ValueError, UnsupportedModelError, PipelineLoadError: The model, a setting or the
                folder cannot be used.
            BackendUnavailableError: The backend cannot run the model's heads here.
            MissingPackageError: ffmpeg cannot write the videos.
        """
        first = self.items[0]
        request = self.request(first)
        warnings = check_runs(self.load, [request], self.asked.force)
        # Only one rank warns.
        if self.ranks.is_first:
            print_warnings(warnings)
        check_run_folder(self.run.path, what="run")
        check_encoders(
            self.run.path, (".mp4", ".mkv") if self.asked.lossless else (".mp4",), self.asked.fps
        )
        self.run.check_adoption(self.settings(), self.asked.overwrite)

    def claim(self) -> None:
        """Assign the folder to this run, under the lock: another process may be writing there.

        Raises:
            ValueError: The folder has other settings, or contains other files.
        """
        self.run.adopt(self.settings(), self.asked.overwrite)

    def settings(self) -> dict[str, Any]:
        """Everything that the videos depend on."""
        return {
            "suite": self.suite,
            "num_prompts": len(self.prompts),
            "videos_per_prompt": self.asked.videos_per_prompt,
            "seed": self.asked.seed,
            "fps": self.asked.fps,
            "lossless": self.asked.lossless,
            "model": self.load.model,
            "dtype": str(self.load.resolved_dtype).removeprefix("torch."),
            "attention_backend": self.load.attention_backend,
            "video": asdict(self.video),
            "sparse": None if self.sparse is None else self.sparse.to_dict(),
        }

    def generate(self) -> None:
        """Generate this rank's missing videos and report the outcome.

        Raises:
            RuntimeError: Some videos failed, or the run had to stop.
        """
        from eval_vbench.sampling import sample

        share, items = self.share, self.items
        # Only a single rank has a display; those of several ranks would mix.
        alone = share.num_ranks == 1 and self.ranks.is_first
        shown = JobProgress(progress_console() if alone else Console(quiet=True))
        ours = share.of(items)
        missing = [item for item in ours if self.run.record(item.key) is None]
        print_message(f"{len(ours) - len(missing)} of {len(ours)} videos already exist")
        attempts = Attempts(self.run, print_message)
        if self._any_missing(missing):
            if not self.verbose:
                quiet_libraries()
            self.run.forget_failures(item.key for item in missing)
            with shown.running():
                sample(self, self._load(missing, shown), missing, attempts, shown)
        # A launcher ends all ranks when one has failed, so failures are reported at the end.
        self.ranks.meet()
        if self.ranks.is_first:
            unfinished = [item for item in items if self.run.record(item.key) is None]
            attempts.failed = sum(self.run.failure(item.key) is not None for item in unfinished)
            attempts.conclude(len(items))
            output_console().print(f"videos     {self.run.videos}", soft_wrap=True)

    def _load(self, missing: list[VideoItem], shown: JobProgress) -> "HunyuanVideoPipeline":
        """Load the model, let the team share it, and announce the work."""
        from xattn_video.pipelines.expected_work import ExpectedWork
        from xattn_video.pipelines.loading import load_pipeline
        from xattn_video.pipelines.prompt_length import cut_prompts

        if self.share.num_ranks > 1:
            print_message(f"loading {self.load.model}")
        shown.load(self.load.model, downloads=is_on_hub(self.load.model))
        if self.team.team_size > 1:
            self.ranks.connect(self.load.resolved_device)
        pipe = load_pipeline(self.load)
        WorkSplit(self.team.team_size).share(pipe)
        pipe.set_progress_bar_config(disable=True)
        requests = [self.request(item) for item in missing]
        print_warnings(cut_prompts(pipe, requests))
        work = ExpectedWork.of(pipe)
        shown.left.decoding_steps = work.decoding_steps(self.video)
        # A rank may have no missing videos and only help its team.
        shown.expect([work.of_run(self.request(self.items[0]))] * len(missing))
        return pipe

    def _any_missing(self, missing: list[VideoItem]) -> bool:
        """Whether this rank, or one of those that it joins in a group, has videos to make."""
        if self.team.team_size == 1:
            return bool(missing)
        return self.ranks.share(
            "any missing",
            lambda: any(self.run.record(item.key) is None for item in self.items),
        )

    def request(self, item: VideoItem) -> GenerationRequest:
        """The request for a video."""
        return GenerationRequest(
            item.prompt.text, seed=item.seed, video=self.video, sparse=self.sparse
        )
