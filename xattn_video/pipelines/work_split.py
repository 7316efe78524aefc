"""How the ranks of a job share the work: one video, or many prompts."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

from xattn_video.pipelines.request import VideoSettings

if TYPE_CHECKING:
    from xattn_video.pipelines.job_ranks import JobRanks
    from xattn_video.pipelines.model_shape import ModelShape

Asked = Literal["auto", "ulysses", "prompts"]


@dataclass(frozen=True, slots=True)
class WorkSplit:
    """What each rank does.

    Attributes:
        num_ranks: Of the job.
        by_prompt: Whether each rank makes videos of its own.
    """

    num_ranks: int = 1
    by_prompt: bool = False

    @property
    def ranks_per_video(self) -> int:
        """How many compute one video together."""
        return 1 if self.by_prompt else self.num_ranks

    def writes(self, ranks: "JobRanks") -> bool:
        """Whether the rank has videos to write."""
        return self.by_prompt or ranks.is_first

    def share(self, pipe: Any) -> None:
        """Set a loaded pipeline up for it."""
        if self.ranks_per_video > 1:
            from xattn_video.processors.context_parallel import enable_context_parallel

            enable_context_parallel(pipe)


def check_parallel(asked: str, num_ranks: int) -> None:
    """Raise ValueError unless the way to share is known and there are ranks for it."""
    if asked not in get_args(Asked):
        raise ValueError(f"parallel must be one of {', '.join(get_args(Asked))}, got {asked!r}.")
    if asked != "auto" and num_ranks == 1:
        raise ValueError(
            f"--parallel {asked} shares the work of several ranks, got one; start it with "
            "torchrun --nproc-per-node N -m xattn_video.cli, or leave it out."
        )


def choose_split(
    asked: str,
    num_ranks: int,
    shape: "ModelShape",
    video: VideoSettings,
    num_prompts: int | None,
) -> WorkSplit:
    """How the ranks share the work, before anything is loaded.

    Args:
        asked: One of `Asked`. ``auto`` deals out the prompts of a file if every rank has one, and
            else lets all ranks share each video.
        num_ranks: Of the job.
        shape: The sizes of the model.
        video: The size of each video.
        num_prompts: In the prompts file; None for a single prompt.

    Raises:
        ValueError: The ranks cannot share it so.
    """
    check_parallel(asked, num_ranks)
    if num_ranks == 1:
        return WorkSplit()
    if asked == "prompts" and num_prompts is None:
        raise ValueError(
            "--parallel prompts deals out the prompts of a file; give --prompts-file, or "
            "--parallel ulysses for one video."
        )
    if asked == "prompts" or (asked == "auto" and (num_prompts or 0) >= num_ranks):
        return WorkSplit(num_ranks, by_prompt=True)
    divisors = [part for part in range(2, shape.heads + 1) if shape.heads % part == 0]
    if shape.heads % num_ranks:
        raise ValueError(
            f"{shape.heads} heads do not divide among {num_ranks} ranks; use "
            f"{', '.join(map(str, divisors))} ranks, or --prompts-file with --parallel prompts."
        )
    return WorkSplit(num_ranks)
