"""Score a run with VBench, which lives in an environment of its own.

python -m eval_vbench.score --run runs/dense --vbench-python vbench-env/bin/python
"""

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from eval_vbench.dimensions import check_dimensions
from eval_vbench.preflight import (
    Environment,
    Missing,
    missing_needs,
    preflight_table,
    probe_environment,
)
from eval_vbench.run_folder import RunFolder
from eval_vbench.score_files import Score, read_scores, write_score
from eval_vbench.vbench_process import ScoringError, check_videos, run_dimensions, score_dimension
from xattn_video.options.command import CONTEXT_SETTINGS, AsJson, command
from xattn_video.reporting.console import (
    ErrorsToExitCodes,
    OneLineCommand,
    message_console,
    output_console,
    print_error,
    print_message,
)

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
_DEFAULT_PYTHON = Path("vbench-env/bin/python")


@app.command(
    cls=OneLineCommand,
    context_settings=CONTEXT_SETTINGS,
    epilog="Example: python -m eval_vbench.score --run runs/dense --vbench-python "
    "vbench-env/bin/python",
)
@command
def main(
    run: Annotated[Path, typer.Option(help="A run that eval_vbench.generate made.")],
    errors: ErrorsToExitCodes,
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
    as_json: AsJson = False,
) -> None:
    """Score a run; existing scores are kept."""
    folder = RunFolder(run)
    check_videos(folder)
    names = _chosen(folder, dimensions)
    environment = probe_environment(vbench_python)
    place = weights or Path(os.environ.get("VBENCH_CACHE_DIR", "~/.cache/vbench"))
    place = place.expanduser().resolve()
    scored = read_scores(folder)
    lacking = {name: missing_needs(name, environment, place) for name in names}
    console = message_console() if as_json else output_console()
    console.print(preflight_table(lacking, scored), soft_wrap=True)
    unready = [name for name in names if lacking[name] and name not in scored]
    if unready and not skip_missing:
        raise ValueError(
            f"{len(unready)} of {len(names)} dimensions cannot be scored, see above; supply "
            "what they lack, or score the others with --skip-missing."
        )
    todo = [name for name in names if name not in unready and name not in scored]
    errors.running = True
    try:
        _score(folder, todo, environment, place, device, as_json)
    finally:
        if as_json:
            typer.echo(json.dumps(_json(read_scores(folder), lacking), indent=2))


def _json(scores: dict[str, Score], lacking: dict[str, list[Missing]]) -> dict[str, Any]:
    """The scores, and what the other dimensions lack."""
    return {
        "scores": {
            name: {"score": s.score, "videos": len(s.videos)} for name, s in scores.items()
        },
        "lacking": {
            name: [asdict(entry) for entry in missing]
            for name, missing in lacking.items()
            if missing and name not in scores
        },
    }


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
    run: RunFolder,
    names: list[str],
    environment: Environment,
    weights: Path,
    device: str | None,
    quiet: bool,
) -> None:
    """Score one dimension after the other; one that fails does not stop the rest.

    Raises:
        ScoringError: Some failed.
    """
    failed = 0
    for number, name in enumerate(names):
        print_message(f"{number + 1}/{len(names)} {name}")
        try:
            score = score_dimension(run, name, environment, weights, device)
        except ScoringError as error:
            print_error(f"failed: {name}: {error}")
            failed += 1
            continue
        write_score(run, score)
        if not quiet:
            line = f"{name:<24}{score.score:.4f}  {len(score.videos)} videos"
            output_console().print(line, soft_wrap=True)
    if failed:
        raise ScoringError(
            f"{failed} of {len(names)} dimensions failed, as listed above; the others are kept, "
            "and the same command tries these again."
        )


if __name__ == "__main__":
    app()
