"""`xattn-video demo`: dense and sparse attention from the same noise, on one page."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from xattn_video.cli.compare_job import CompareJob
from xattn_video.cli.compare_options import CompareDetails
from xattn_video.cli.page_file import PageWish
from xattn_video.options.command import Group, command, knob
from xattn_video.options.groups import loading, sparse_settings
from xattn_video.pipelines.request import GenerationRequest, VideoSettings
from xattn_video.pipelines.source import DEMO
from xattn_video.policy.settings import SparseSettings
from xattn_video.reporting.endings import ErrorsToExitCodes

if TYPE_CHECKING:
    from xattn_video.pipelines.loading import LoadOptions

# Two CPU cores generate it twice in about a minute.
DEMO_VIDEO = VideoSettings(height=256, width=256, num_frames=33, num_inference_steps=25)
_PROMPT = "a red circle moving left to right over a blue background"


@dataclass(frozen=True, slots=True)
class DemoDetails:
    """The prompt, the seed and the output."""

    prompt: str = knob("What the video shows, in the demo model's words.", _PROMPT, panel="Video")
    seed: int = knob("Seed of the initial noise.", 0, panel="Video")
    output: Path = knob(
        "Folder for the page and the videos.", Path("xattn-demo"), panel="Files", kind=Path
    )
    overwrite: bool = knob(
        "Discard the results in the folder and start over.", False, "--overwrite", panel="Files"
    )
    open: bool = knob("Open the page in the browser.", False, "--open", panel="Files")


def _of_the_demo(group: Group, *without: str) -> Group:
    """The same options for the demo model, without some of them."""
    options = {name: made for name, made in group.options.items() if name not in without}
    fixed = {"model": DEMO, **dict.fromkeys(without)}
    return Group(options, lambda values: group.make(values | fixed))


@command
def demo(
    details: DemoDetails,
    load: Annotated["LoadOptions", _of_the_demo(loading("dtype", "device"))],
    sparse: Annotated[SparseSettings, _of_the_demo(sparse_settings(), "dense")],
    errors: ErrorsToExitCodes,
) -> None:
    """Show a dense and a sparse demo video side by side, in about a minute, without a GPU."""
    from xattn_video.measure.methods import method_of

    job = CompareJob(
        load,
        (GenerationRequest(details.prompt, None, details.seed, DEMO_VIDEO, sparse=None),),
        (method_of(sparse),),
        CompareDetails(output=details.output, overwrite=details.overwrite, kept_mass=False),
        PageWish(open=details.open),
        errors.verbose,
        table=False,
    )
    job.start(errors)
