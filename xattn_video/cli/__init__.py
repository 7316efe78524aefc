"""The commands of `xattn-video`, one file each."""

from typing import Annotated

import typer

from xattn_video import __version__
from xattn_video.cli.backends import backends
from xattn_video.cli.bench import bench
from xattn_video.cli.calibrate import calibrate
from xattn_video.cli.compare import compare
from xattn_video.cli.demo import demo
from xattn_video.cli.generate import generate
from xattn_video.cli.plan import plan
from xattn_video.cli.prefill import prefill
from xattn_video.options.command import CONTEXT_SETTINGS
from xattn_video.pipelines.job_ranks import joined_ranks
from xattn_video.reporting.console import print_error
from xattn_video.reporting.endings import OneLineErrors

app = typer.Typer(
    name="xattn-video",
    help="HunyuanVideo with block-sparse attention (XAttention).",
    epilog='Example: xattn-video generate --model demo --prompt "a red circle moving left to '
    'right over a blue background". '
    "Exit codes: 0 done, 2 an argument is invalid, or a model, backend or package cannot be used "
    "(nothing was run), 1 the run failed, "
    "129 its terminal was closed (SIGHUP), 130 it was interrupted (Ctrl-C), "
    "143 it was terminated (SIGTERM).",
    cls=OneLineErrors,
    context_settings=CONTEXT_SETTINGS,
    pretty_exceptions_enable=False,
)
EXAMPLES = {
    demo: "demo --open",
    generate: 'generate --prompt "a cat walks on the grass" --output cat.mp4',
    compare: "compare --model demo --demo-prompts 4 --thresholds 0.9,0.95",
    calibrate: "calibrate --preset balanced --prompts-file prompts.txt --output densities.json",
    plan: "plan --num-frames 61 --device cuda",
    bench: "bench --num-frames 61",
    backends: "backends --device cuda",
    prefill: "prefill --model Qwen/Qwen2.5-7B-Instruct-1M --tokens 131072 --compare dense",
}
for _command, _example in EXAMPLES.items():
    app.command(epilog=f"Example: xattn-video {_example}")(_command)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"xattn-video {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def _options(
    context: typer.Context,
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version."
        ),
    ] = False,
) -> None:
    """HunyuanVideo with block-sparse attention (XAttention)."""
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


def main() -> None:
    """Entry point of `xattn-video`."""
    with joined_ranks(print_error) as ranks:
        app(obj=ranks)
