"""How the ranks of a job share the work: on one video, or by prompt."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

from xattn_video.pipelines.request import VideoSettings

if TYPE_CHECKING:
    from xattn_video.pipelines.job_ranks import JobRanks

Asked = Literal["auto", "ulysses", "cfg", "prompts"]


@dataclass(frozen=True, slots=True)
class WorkSplit:
    """What each rank does.

    Attributes:
        num_ranks: Number of ranks in the job.
        by_prompt: Whether each rank makes separate videos.
        by_pass: Whether each half of the ranks computes one of the two passes of true guidance.
    """

    num_ranks: int = 1
    by_prompt: bool = False
    by_pass: bool = False

    @property
    def ranks_per_video(self) -> int:
        """Number of ranks that compute one video together."""
        return 1 if self.by_prompt else self.num_ranks

    @property
    def ranks_per_pass(self) -> int:
        """Number of ranks that share the tokens of a forward pass."""
        return self.ranks_per_video // (2 if self.by_pass else 1)

    def writes(self, ranks: "JobRanks") -> bool:
        """Whether the rank has videos to write."""
        return self.by_prompt or ranks.is_first

    def share(self, pipe: Any) -> None:
        """Set up a loaded pipeline for this split."""
        from xattn_video.processors.context_parallel import (
            enable_context_parallel,
            ranks_of_tokens,
        )
        from xattn_video.processors.guidance_split import enable_guidance_split
        from xattn_video.processors.tile_split import enable_tile_split

        if self.ranks_per_pass > 1:
            enable_context_parallel(pipe, self.ranks_per_pass)
        if self.by_pass:
            enable_guidance_split(pipe)
            enable_tile_split(pipe)
        elif self.ranks_per_video > 1:
            enable_tile_split(pipe, ranks_of_tokens(pipe.transformer))


def check_parallel(asked: str, num_ranks: int) -> None:
    """Raise ValueError if the way to share is unknown, or needs more than one rank."""
    if asked not in get_args(Asked):
        raise ValueError(f"parallel must be one of {', '.join(get_args(Asked))}, got {asked!r}.")
    if asked != "auto" and num_ranks == 1:
        raise ValueError(
            f"--parallel {asked} needs several ranks, got one; start with torchrun "
            "--nproc-per-node N -m xattn_video.cli, or omit --parallel."
        )


def choose_split(
    asked: str,
    num_ranks: int,
    model: str,
    video: VideoSettings,
    num_prompts: int | None,
) -> WorkSplit:
    """Choose how the ranks share the work, before anything is loaded.

    Args:
        asked: One of `Asked`. ``auto`` splits by prompt if a file has one for every rank.
            Otherwise all ranks share each video: with true guidance and an even number of ranks
            by pass (and by token, beyond two ranks), else by token only.
        num_ranks: Number of ranks in the job.
        model: As in `LoadOptions`.
        video: The size of each video.
        num_prompts: Number of prompts in the prompts file; None for a single prompt.

    Raises:
        ValueError: The ranks cannot share the work in this way.
    """
    from xattn_video.pipelines.model_shape import read_model_shape
    from xattn_video.pipelines.source import find_model

    check_parallel(asked, num_ranks)
    if num_ranks == 1:
        return WorkSplit()
    if asked == "prompts" and num_prompts is None:
        raise ValueError(
            "--parallel prompts needs --prompts-file; give it, or use --parallel ulysses for one "
            "video."
        )
    if asked == "prompts" or (asked == "auto" and (num_prompts or 0) >= num_ranks):
        return WorkSplit(num_ranks, by_prompt=True)
    guided = video.true_cfg_scale > 1
    if asked == "cfg" and (not guided or num_ranks % 2):
        raise ValueError(
            "--parallel cfg needs true_cfg_scale above 1 and an even number of ranks, got "
            f"true_cfg_scale={video.true_cfg_scale:g} with {num_ranks} ranks; change them, or use "
            "--parallel ulysses."
        )
    by_pass = asked == "cfg" or (asked == "auto" and guided and num_ranks % 2 == 0)
    split = WorkSplit(num_ranks, by_pass=by_pass)
    heads = read_model_shape(find_model(model)).heads
    if heads % split.ranks_per_pass:
        fitting = [part for part in range(2, heads + 1) if heads % part == 0]
        fitting = [part * 2 if by_pass else part for part in fitting]
        raise ValueError(
            f"{heads} heads cannot be divided evenly among {split.ranks_per_pass} ranks; use "
            f"{', '.join(map(str, fitting))} ranks, or --prompts-file with --parallel prompts."
        )
    return split
