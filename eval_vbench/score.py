"""Score a run with VBench, which lives in an environment of its own.

python -m eval_vbench.score --run runs/dense --vbench-python vbench-env/bin/python
"""

import os
from pathlib import Path
from typing import Annotated

import typer

from eval_vbench.dimensions import check_dimensions
from eval_vbench.preflight import (
    Environment,
    missing_needs,
    preflight_table,
    probe_environment,
)
from eval_vbench.run_folder import RunFolder
from eval_vbench.score_files import read_scores, write_score
from eval_vbench.vbench_process import ScoringError, check_videos, run_dimensions, score_dimension
from xattn_video.reporting.console import (
    ErrorsToExitCodes,
    OneLineCommand,
    expands_paths,
    message_console,
    output_console,
)

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
_DEFAULT_PYTHON = Path("vbench-env/bin/python")


@app.command(cls=OneLineCommand)
@expands_paths
def main(
    run: Annotated[Path, typer.Option(help="A run that eval_vbench.generate made.")],
    vbench_python: Annotated[
        Path, typer.Option(help="Python of the environment that eval_vbench.setup_vbench made.")
    ] = _DEFAULT_PYTHON,
    weights: Annotated[
        Path | None,
        typer.Option(
            help="Folder of VBench's weights.",
            show_default="$VBENCH_CACHE_DIR or ~/.cache/vbench, as VBench itself",
        ),
    ] = None,
    dimensions: Annotated[
        str | None,
        typer.Option(help="Names, separated by commas.", show_default="all of the prompts"),
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="cpu or cuda.", show_default="cuda if there is one")
    ] = None,
    skip_missing: Annotated[
        bool, typer.Option("--skip-missing", help="Skip dimensions that cannot be scored.")
    ] = False,
    verbose: Annotated[bool, typer.Option("--verbose", help="Print the traceback.")] = False,
) -> None:
    """Score a run; existing scores are kept."""
    with ErrorsToExitCodes(verbose) as errors:
        folder = RunFolder(run)
        check_videos(folder)
        names = _chosen(folder, dimensions)
        environment = probe_environment(vbench_python)
        place = weights or Path(os.environ.get("VBENCH_CACHE_DIR", "~/.cache/vbench"))
        place = place.expanduser().resolve()
        scored = read_scores(folder)
        lacking = {name: missing_needs(name, environment, place) for name in names}
        output_console().print(preflight_table(lacking, scored), soft_wrap=True)
        unready = [name for name in names if lacking[name] and name not in scored]
        if unready and not skip_missing:
            raise ValueError(
                f"{len(unready)} of {len(names)} dimensions cannot be scored, see above; supply "
                "what they lack, or score the others with --skip-missing."
            )
        todo = [name for name in names if name not in unready and name not in scored]
        errors.running = True
        _score(folder, todo, environment, place, device)


def _chosen(run: RunFolder, given: str | None) -> list[str]:
    """The dimensions to score.

    Raises:
        ValueError: Unknown ones, or ones that no prompt of the run belongs to.
    """
    possible = run_dimensions(run)
    if given is None:
        return possible
    names = [name.strip() for name in given.split(",")]
    check_dimensions(names)
    foreign = [name for name in names if name not in possible]
    if foreign:
        raise ValueError(
            f"no prompt of this run belongs to {', '.join(foreign)}; "
            f"it can be scored on {', '.join(possible)}."
        )
    return names


def _score(
    run: RunFolder, names: list[str], environment: Environment, weights: Path, device: str | None
) -> None:
    """Score one dimension after the other; one that fails does not stop the rest.

    Raises:
        ScoringError: Some failed.
    """
    messages, results = message_console(), output_console()
    failed = 0
    for number, name in enumerate(names):
        messages.print(f"{number + 1}/{len(names)} {name}", soft_wrap=True)
        try:
            score = score_dimension(run, name, environment, weights, device)
        except ScoringError as error:
            messages.print(f"failed: {name}: {error}", soft_wrap=True)
            failed += 1
            continue
        write_score(run, score)
        results.print(f"{name:<24}{score.score:.4f}  {len(score.videos)} videos", soft_wrap=True)
    if failed:
        raise ScoringError(
            f"{failed} of {len(names)} dimensions failed, as listed above; the others are kept, "
            "and the same command tries these again."
        )


if __name__ == "__main__":
    app()
