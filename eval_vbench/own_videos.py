"""A folder of the user's own videos, which VBench scores without prompts ("custom input")."""

import hashlib
from pathlib import Path

from eval_vbench.dimensions import dimensions
from eval_vbench.preflight import VBENCH_VERSION, Environment
from eval_vbench.score_files import Score, read_score_file, write_score_file
from eval_vbench.vbench_process import read_answer, run_vbench
from xattn_video.pipelines.item_folder import file_digest

# For these dimensions VBench compares videos with lists that belong to its own prompts.
_NEED_VBENCH_PROMPTS = {
    "object_class",
    "multiple_objects",
    "color",
    "spatial_relationship",
    "scene",
    "appearance_style",
}
# File types that VBench accepts; other files of the folder are ignored.
_SUFFIXES = (".mp4", ".gif")


class OwnVideos:
    """Scores of a folder's videos, kept in its subfolder ``vbench``.

    For three dimensions (human_action, temporal_style, overall_consistency) the file name says
    what a video shows.

    Args:
        folder: A folder with .mp4 or .gif files.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.scores_folder = folder / "vbench"

    @property
    def files(self) -> list[Path]:
        """The videos, sorted by name."""
        return sorted(path for path in self.folder.glob("*") if path.suffix.lower() in _SUFFIXES)

    def check(self) -> None:
        """Raise ValueError unless the folder holds videos."""
        if not self.folder.is_dir():
            raise ValueError(f"{str(self.folder)!r} is not a folder; give a folder with videos.")
        if not self.files:
            raise ValueError(
                f"{str(self.folder)!r} contains no video that VBench accepts; "
                f"expected files that end in {' or '.join(_SUFFIXES)}."
            )

    def dimensions(self) -> list[str]:
        """The dimensions that VBench scores without its own prompts."""
        return [name for name in dimensions() if name not in _NEED_VBENCH_PROMPTS]

    def scores(self) -> dict[str, Score]:
        """{dimension: score}, for scores of the videos as they are now."""
        digest = self._digest()
        found = {
            name: read_score_file(self.scores_folder / f"{name}.json")
            for name in self.dimensions()
        }
        return {name: s for name, s in found.items() if s is not None and s.digest == digest}

    def score(
        self, dimension: str, environment: Environment, weights: Path, device: str | None
    ) -> Score:
        """Let VBench score one dimension; see `vbench_process.run_vbench`."""
        log = self.scores_folder / f"{dimension}.log"
        answer = run_vbench(self.folder, dimension, None, log, environment, weights, device)
        names = [path.name for path in self.files]
        score, videos = read_answer(dimension, answer, names)
        return Score(dimension, score, videos, self._digest(), VBENCH_VERSION)

    def keep(self, score: Score) -> None:
        """Write a score to its file."""
        write_score_file(self.scores_folder, score)

    def _digest(self) -> str:
        digest = hashlib.sha256()
        for path in self.files:
            digest.update(f"{path.name} {file_digest(path)}\n".encode())
        return digest.hexdigest()
