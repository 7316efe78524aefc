"""The command line: `xattn-video generate | compare | plan | bench | backends`."""

from typing import Annotated

import typer

from xattn_video import __version__
from xattn_video.cli.backends import backends
from xattn_video.cli.bench import bench
from xattn_video.cli.compare import compare
from xattn_video.cli.generate import generate
from xattn_video.cli.plan import plan
from xattn_video.reporting.console import OneLineErrors, expands_paths

app = typer.Typer(
    name="xattn-video",
    help="HunyuanVideo with block-sparse attention (XAttention).",
    epilog="Exit codes: 0 done, 2 an argument is wrong and nothing was run, 1 the run failed, "
    "130 it was interrupted (Ctrl-C), 143 it was terminated (SIGTERM).",
    cls=OneLineErrors,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for _command in (generate, compare, plan, bench, backends):
    app.command()(expands_paths(_command))


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
    app()
