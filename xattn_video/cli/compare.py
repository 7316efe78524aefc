"""`xattn-video compare`: dense against sparse videos, or two video files."""

from typing import TYPE_CHECKING, Annotated

import typer

from xattn_video.cli.compare_files import FilesJob
from xattn_video.cli.compare_job import CompareJob
from xattn_video.cli.compare_options import (
    GRID,
    CompareDetails,
    ComparedPrompts,
    ExistingFiles,
    compared_prompts,
    compared_requests,
    refuse_unused,
)
from xattn_video.cli.page_file import PageWish
from xattn_video.options.command import AsJson, command
from xattn_video.options.groups import loading, video_settings
from xattn_video.pipelines.request import VideoSettings
from xattn_video.reporting.endings import ErrorsToExitCodes

if TYPE_CHECKING:
    from xattn_video.measure.methods import Method
    from xattn_video.pipelines.loading import LoadOptions


@command
def compare(
    prompts: ComparedPrompts,
    methods: Annotated["tuple[Method, ...]", GRID],
    files: ExistingFiles,
    load: Annotated["LoadOptions", loading()],
    video: Annotated[VideoSettings, video_settings()],
    details: CompareDetails,
    page: PageWish,
    errors: ErrorsToExitCodes,
    context: typer.Context,
    as_json: AsJson = False,
) -> None:
    """Measure how close sparse videos are to dense ones. Run it again to resume."""
    from xattn_video.pipelines.memory import settle_offload

    asked = (prompts.prompt, prompts.prompts_file, prompts.demo_prompts)
    if files.reference is not None or files.candidate is not None:
        existing = FilesJob.of(
            files.reference, files.candidate, details.output, details.overwrite, page
        )
        refuse_unused(context)
        existing.check()
        errors.running = True
        existing.run(as_json)
        return
    texts = compared_prompts(load.model, *asked)
    job = CompareJob(
        settle_offload(load, video),
        compared_requests(texts, details.seeds, details.negative_prompt, video),
        methods,
        details,
        page,
        errors.verbose,
    )
    job.start(errors, as_json)
