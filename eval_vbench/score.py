"""Score a run, or any folder of videos, with VBench, which has its own environment.

python -m eval_vbench.score --run runs/dense --vbench-python vbench-env/bin/python
python -m eval_vbench.score --videos my-videos --vbench-python vbench-env/bin/python
python -m eval_vbench.score --download --dimensions motion_smoothness
"""

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeAlias

import typer

from eval_vbench import dimensions as vbench
from eval_vbench.downloads import download_weights
from eval_vbench.own_videos import OwnVideos
from eval_vbench.preflight import (
    Environment,
    Missing,
    missing_needs,
    preflight_table,
    probe_environment,
)
from eval_vbench.score_files import Score
from eval_vbench.vbench_process import RunVideos, ScoringError
from xattn_video.files import check_output_folder
from xattn_video.options.command import CONTEXT_SETTINGS, AsJson, command, knob
from xattn_video.reporting.console import (
    message_console,
    output_console,
    print_error,
    print_message,
)
from xattn_video.reporting.endings import ErrorsToExitCodes, OneLineCommand

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@dataclass(frozen=True, slots=True)
class Scored:
    """The videos to score, and the environment and weights to score them with."""

    run: Path | None = knob("A run of eval_vbench.generate.")
    videos: Path | None = knob(
        "A folder of .mp4 or .gif files, instead of a run; the scores go to its folder vbench."
    )
    vbench_python: Path = knob(
        "Python of the environment created by eval_vbench.setup_vbench.",
        Path("vbench-env/bin/python"),
    )
    weights: Path | None = knob(
        "Folder of VBench's weights.",
        shown_default="$VBENCH_CACHE_DIR or ~/.cache/vbench, as VBench itself",
    )
    dimensions: str | None = knob(
        "Dimension names, separated by commas.", shown_default="all that these videos support"
    )
    device: str | None = knob("cpu or cuda.", shown_default="cuda if there is one")
    skip_missing: bool = knob("Skip dimensions that cannot be scored.", False, "--skip-missing")
    download: bool = knob(
        "First download missing weights and check their checksums; without --run and "
        "--videos nothing else is done.",
        False,
        "--download",
    )

    @property
    def weights_folder(self) -> Path:
        """The folder of VBench's weights."""
        place = self.weights or Path(os.environ.get("VBENCH_CACHE_DIR", "~/.cache/vbench"))
        return place.expanduser().resolve()


_Videos: TypeAlias = RunVideos | OwnVideos


@app.command(
    cls=OneLineCommand,
    context_settings=CONTEXT_SETTINGS,
    epilog="Example: python -m eval_vbench.score --run runs/dense --vbench-python "
    "vbench-env/bin/python",
)
@command
def main(asked: Scored, errors: ErrorsToExitCodes, as_json: AsJson = False) -> None:
    """Score a run or a folder of videos; existing scores are kept."""
    from xattn_video.pipelines.loading import LoadOptions

    if asked.device is not None:
        # VBench's environment has a torch of its own, so only the name is checked.
        LoadOptions(device=asked.device, device_elsewhere=True)
    videos = _videos(asked)
    if videos is not None:
        videos.check()
    names = _chosen(videos, asked.dimensions)
    place = asked.weights_folder
    if asked.download:
        errors.running = True
        download_weights(names, place, print_message)
    if videos is None:
        return
    environment = probe_environment(asked.vbench_python)
    scored = videos.scores()
    lacking = {name: missing_needs(name, environment, place) for name in names}
    console = message_console() if as_json else output_console()
    console.print(preflight_table(lacking, scored), soft_wrap=True)
    unready = [name for name in names if lacking[name] and name not in scored]
    if unready and not asked.skip_missing:
        raise ValueError(
            f"{len(unready)} of {len(names)} dimensions cannot be scored, see above; add "
            "what is missing (--download downloads weights), or score the others with "
            "--skip-missing."
        )
    todo = [name for name in names if name not in unready and name not in scored]
    if todo:
        check_output_folder(videos.scores_folder, what="scores")
    errors.running = True
    try:
        for name in _score(videos, todo, environment, asked):
            if not as_json:
                output_console().print(name, soft_wrap=True)
    finally:
        if as_json:
            typer.echo(json.dumps(_json(videos.scores(), lacking), indent=2))


def _videos(asked: Scored) -> _Videos | None:
    """The videos to score; None if weights are only downloaded.

    Raises:
        ValueError: Both --run and --videos were given, or neither and nothing is downloaded.
    """
    if asked.run is not None and asked.videos is not None:
        raise ValueError("--run and --videos cannot be combined; give only one of them.")
    if asked.run is not None:
        return RunVideos(asked.run)
    if asked.videos is not None:
        return OwnVideos(asked.videos)
    if not asked.download:
        raise ValueError("give --run or --videos, or --download to fetch weights; got none.")
    return None


def _json(scores: dict[str, Score], lacking: dict[str, list[Missing]]) -> dict[str, Any]:
    """The scores, and what the other dimensions lack, as plain values."""
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


def _chosen(videos: _Videos | None, given: str | None) -> list[str]:
    """The dimensions to score.

    Raises:
        ValueError: A dimension is unknown, or these videos cannot be scored on it.
    """
    possible = list(vbench.dimensions()) if videos is None else videos.dimensions()
    if given is None:
        return possible
    names = [name.strip() for name in given.split(",")]
    vbench.check_dimensions(names)
    foreign = [name for name in names if name not in possible]
    if foreign and isinstance(videos, OwnVideos):
        raise ValueError(
            f"{', '.join(foreign)} need VBench's own prompts; videos without them can be scored "
            f"on {', '.join(possible)}."
        )
    if foreign:
        raise ValueError(
            f"no prompt of this run belongs to {', '.join(foreign)}; "
            f"it can be scored on {', '.join(possible)}."
        )
    return names


def _score(
    videos: _Videos, names: Sequence[str], environment: Environment, asked: Scored
) -> Iterator[str]:
    """Score the dimensions one by one and yield a line for each; failures do not stop the rest.

    Raises:
        ScoringError: Some dimensions failed.
    """
    failed = 0
    for number, name in enumerate(names):
        print_message(f"{number + 1}/{len(names)} {name}")
        try:
            score = videos.score(name, environment, asked.weights_folder, asked.device)
        except ScoringError as error:
            print_error(f"failed: {name}: {error}")
            failed += 1
            continue
        videos.keep(score)
        yield f"{name:<24}{score.score:.4f}  {len(score.videos)} videos"
    if failed:
        raise ScoringError(
            f"{failed} of {len(names)} dimensions failed, as listed above; the others are kept. "
            "Run the same command again to retry."
        )


if __name__ == "__main__":
    app()
