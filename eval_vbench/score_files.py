"""Reads and writes VBench's scores of a run, as files in its folder."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from eval_vbench.dimensions import dimensions
from eval_vbench.prompts import VideoItem
from eval_vbench.run_folder import RunFolder
from xattn_video.files import write_json


@dataclass(frozen=True, slots=True)
class Score:
    """The score of one dimension of one run.

    Attributes:
        dimension: Name of the dimension.
        score: VBench's own aggregate.
        videos: {file name: the video's value, 0 to 1}.
        digest: Digest of the videos that were scored.
        vbench: Version of the vbench package.
    """

    dimension: str
    score: float
    videos: dict[str, float]
    digest: str
    vbench: str


def write_score_file(folder: Path, score: Score) -> None:
    """Write a score to its file in a folder."""
    write_json(folder / f"{score.dimension}.json", asdict(score))


def read_score(run: RunFolder, dimension: str) -> Score | None:
    """The score of a dimension; None if the videos as they are now have no score.

    Raises:
        ValueError: The file is not a score.
    """
    score = read_score_file(run.scores / f"{dimension}.json")
    if score is None:
        return None
    return score if score.digest == videos_digest(run, scored_items(run, dimension)) else None


def read_score_file(file: Path) -> Score | None:
    """The score in a file; None if there is no file.

    Raises:
        ValueError: The file is not a score.
    """
    try:
        return Score(**json.loads(file.read_text(encoding="utf-8")))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"{file} is not what eval_vbench.score writes ({error}); remove it and score again."
        ) from None


def read_scores(run: RunFolder) -> dict[str, Score]:
    """All scores, in VBench's order."""
    scores = (read_score(run, dimension) for dimension in dimensions())
    return {score.dimension: score for score in scores if score is not None}


def scored_items(run: RunFolder, dimension: str) -> list[VideoItem]:
    """The videos of the run on which a dimension is scored."""
    return [
        item
        for item in run.expected_items()
        if any(dimension in entry["dimension"] for entry in item.prompt.entries)
    ]


def videos_digest(run: RunFolder, items: Sequence[VideoItem]) -> str:
    """A digest that changes if any of the videos changes or is missing."""
    digest = hashlib.sha256()
    for item in items:
        record = run.record(item.key)
        content = record["files"][f"videos/{item.file_name}"]["sha256"] if record else "missing"
        digest.update(f"{item.key} {content}\n".encode())
    return digest.hexdigest()
