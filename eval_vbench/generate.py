"""Generates the videos of a run, dense or sparse with one setting. Run it again to resume.

python -m eval_vbench.generate --run runs/dense --dense
accelerate launch -m eval_vbench.generate --run runs/xattn-0.95 --threshold 0.95
torchrun --nproc-per-node 8 -m -- eval_vbench.generate --run runs/dense --dense --gpus-per-video 2
"""

from contextlib import nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

import typer

from eval_vbench.launch import Share, launched_share
from eval_vbench.run_folder import RunFolder
from eval_vbench.sampling_job import RunOptions, SamplingJob
from xattn_video.options.command import CONTEXT_SETTINGS, command
from xattn_video.options.groups import loading, sparse_settings, video_settings
from xattn_video.pipelines.job_ranks import JobRanks, joined_ranks, speak
from xattn_video.pipelines.request import VideoSettings
from xattn_video.policy.settings import SparseSettings
from xattn_video.reporting.console import print_error
from xattn_video.reporting.endings import ErrorsToExitCodes, OneLineCommand

if TYPE_CHECKING:
    from xattn_video.pipelines.loading import LoadOptions

_VIDEO = ("height", "width", "num_frames", "num_inference_steps", "guidance_scale")

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command(
    cls=OneLineCommand,
    context_settings=CONTEXT_SETTINGS,
    epilog="Example: python -m eval_vbench.generate --run runs/dense --dense",
)
@command
def main(
    asked: RunOptions,
    load: Annotated["LoadOptions", loading()],
    video: Annotated[VideoSettings, video_settings(*_VIDEO)],
    sparse: Annotated[SparseSettings | None, sparse_settings()],
    errors: ErrorsToExitCodes,
    ranks: JobRanks,
) -> None:
    """Generate the videos of a run; run the same command again to resume."""
    from xattn_video.pipelines.memory import settle_offload

    count = asked.gpus_per_video
    if count == 1:
        speak()
    with ranks.first_ahead():
        share = launched_share(count)
        load = replace(load, num_gpus=count, device=load.device or _device_of(share))
        if count > 1:
            load = ranks.place(replace(load, device=None if load.device != "cpu" else "cpu"))
        job = SamplingJob(
            RunFolder(asked.run),
            share,
            settle_offload(load, video),
            asked,
            video,
            sparse,
            errors.verbose,
            ranks,
            ranks.team(count),
        )
        if asked.overwrite and share.num_ranks * count > 1:
            raise ValueError(
                "--overwrite replaces the run's videos, which other ranks may be writing, got "
                f"{share.num_ranks * count} ranks; give another --run, or remove the folder."
            )
        job.check()
    # What one rank refuses must leave nothing of the others.
    ranks.meet()
    with job.run.lock_rank(share.rank, share.num_ranks) if job.writes else nullcontext():
        with ranks.first_ahead():
            job.claim()
        errors.running = True
        job.generate()


def _device_of(share: Share) -> str | None:
    """A separate GPU for each rank of a host; None (the default device) for a single process."""
    import torch

    if share.num_ranks == 1 or not torch.cuda.is_available():
        return None
    return f"cuda:{share.local_rank}"


def run() -> None:
    """Entry point, on every rank."""
    with joined_ranks(print_error) as ranks:
        app(obj=ranks)


if __name__ == "__main__":
    run()
