"""Scores a run with the real VBench: one process per dimension, with checks before and after."""

import math
import os
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from eval_vbench.dimensions import dimensions
from eval_vbench.preflight import (
    HUGGING_FACE_HOME,
    TORCH_HOME,
    VBENCH_VERSION,
    WORKER,
    Environment,
)
from eval_vbench.run_folder import RunFolder
from eval_vbench.score_files import (
    Score,
    read_scores,
    scored_items,
    videos_digest,
    write_score_file,
)
from xattn_video.files import check_writable, read_record, write_json
from xattn_video.pipelines.item_folder import file_digest

# In this dimension VBench omits videos in which it finds no object.
_MAY_DROP_VIDEOS = {"color"}
# In this dimension the videos' values are in 0 to 100, but the aggregate is in 0 to 1.
_PERCENT = {"imaging_quality"}
_NAMED = 3


class ScoringError(RuntimeError):
    """VBench failed, or its result is not a score."""


class RunVideos:
    """The videos of a run, with the same methods as `OwnVideos`."""

    def __init__(self, folder: Path) -> None:
        self.run = RunFolder(folder)
        self.scores_folder = self.run.scores

    def check(self) -> None:
        """Check that the folder holds the complete videos of the run and nothing else.

        VBench takes the suffix of all videos from any file it finds. If that is wrong, it returns
        NaN without an error.

        Raises:
            ValueError: A video is missing or was changed, or there is a stray file.
        """
        run, items = self.run, self.run.expected_items()
        found = {path.name for path in run.videos.glob("*")} if run.videos.is_dir() else set()
        stray = sorted(found - {item.file_name for item in items})
        if stray:
            raise ValueError(
                f"{str(run.videos)!r} holds {len(stray)} files that are not videos of this run: "
                f"{_some(stray)}; move them away."
            )
        records = {item: run.record(item.key) for item in items}
        missing = [item.file_name for item, record in records.items() if record is None]
        if missing:
            raise ValueError(
                f"{len(missing)} of {len(items)} videos are missing or changed: "
                f"{_some(missing)}; run eval_vbench.generate again with the run's settings to "
                "generate them."
            )
        broken = [
            item.file_name
            for item, record in records.items()
            if record is not None
            and file_digest(run.video(item))
            != record["files"][f"videos/{item.file_name}"]["sha256"]
        ]
        if broken:
            raise ValueError(
                f"{len(broken)} of {len(items)} videos have changed since they were generated: "
                f"{_some(broken)}; remove them, then run eval_vbench.generate again."
            )

    def dimensions(self) -> list[str]:
        """The dimensions that the run's prompts belong to, in VBench's order."""
        return [name for name in dimensions() if scored_items(self.run, name)]

    def scores(self) -> dict[str, Score]:
        """{dimension: score}, for scores of the videos as they are now."""
        return read_scores(self.run)

    def score(
        self, dimension: str, environment: Environment, weights_folder: Path, device: str | None
    ) -> Score:
        """Let VBench score one dimension; its output goes to scores/{dimension}.log.

        Args:
            dimension: A dimension that can be scored.
            environment: VBench's environment.
            weights_folder: The folder of the weights.
            device: None means CUDA if VBench's torch finds it, else the CPU.

        Raises:
            ScoringError: VBench failed, or its result is not a score of these videos.
        """
        run, items = self.run, scored_items(self.run, dimension)
        prompts = {item.prompt.name: item.prompt for item in items}
        entries = [
            entry
            for prompt in prompts.values()
            for entry in prompt.entries
            if dimension in entry["dimension"]
        ]
        log = run.scores / f"{dimension}.log"
        answer = run_vbench(
            run.videos, dimension, entries, log, environment, weights_folder, device
        )
        score, videos = read_answer(dimension, answer, [item.file_name for item in items])
        return Score(dimension, score, videos, videos_digest(run, items), VBENCH_VERSION)

    def keep(self, score: Score) -> None:
        """Write a score to its file."""
        write_score_file(self.scores_folder, score)


def run_vbench(
    videos: Path,
    dimension: str,
    entries: list[dict[str, Any]] | None,
    log: Path,
    environment: Environment,
    weights_folder: Path,
    device: str | None,
) -> dict[str, Any]:
    """VBench's own result for one dimension of a folder of videos.

    Args:
        videos: The folder of the videos.
        dimension: A dimension that can be scored.
        entries: VBench's entries for the prompts of the videos; None for videos without them.
        log: The file for VBench's output; its folder must exist.
        environment: VBench's environment.
        weights_folder: The folder of the weights.
        device: None means CUDA if VBench's torch finds it, else the CPU.

    Raises:
        ScoringError: VBench failed.
    """
    with tempfile.TemporaryDirectory(prefix="vbench-") as folder:
        request = {
            "full_info": str(Path(folder, "full_info.json")),
            "output": folder,
            "name": dimension,
            "videos": str(videos.resolve()),
            "mode": "custom_input" if entries is None else "vbench_standard",
            "dimension": dimension,
            "device": device,
        }
        write_json(request["full_info"] or "", entries or [])
        request_file = Path(folder, "request.json")
        write_json(request_file, request)
        with log.open("w", encoding="utf-8") as output:
            done = subprocess.run(
                [str(environment.python), str(WORKER), "score", str(request_file)],
                cwd=folder,
                env=_variables(weights_folder),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                check=False,
            )
        if done.returncode:
            # On a full disk VBench fails as it prints, which the log cannot say.
            check_writable(log.parent, what="scores")
            check_writable(Path(folder), what="VBench's result")
            raise ScoringError(f"{_ending(done.returncode)}: {_last_line(log)}; see {log}.")
        result = Path(folder, f"{dimension}_eval_results.json")
        if not result.is_file():
            raise ScoringError(f"VBench wrote no result; see {log}.")
        answer = read_record(result, dimension)
    if answer is None:
        raise ScoringError(
            f"VBench's result in {folder!r} is cut short; free space there, and see {log}."
        )
    return answer


def read_answer(
    dimension: str, answer: dict[str, Any], names: list[str]
) -> tuple[float, dict[str, float]]:
    """The aggregate, and {file name: value}, from VBench's result.

    Raises:
        ScoringError: A value is not finite, or the result is about other videos.
    """
    aggregate, listed = answer[dimension]
    scale = 100 if dimension in _PERCENT else 1
    videos = {
        Path(entry["video_path"]).name: float(entry["video_results"]) / scale for entry in listed
    }
    missing = sorted(set(names) - set(videos))
    if not videos or (missing and dimension not in _MAY_DROP_VIDEOS):
        raise ScoringError(
            f"VBench scored {len(videos)} of {len(names)} videos; missing are {_some(missing)}."
        )
    values = {"the aggregate": float(aggregate), **videos}
    broken = [name for name, value in values.items() if not math.isfinite(value)]
    if broken:
        raise ScoringError(f"VBench's value of {_some(broken)} is not finite.")
    return float(aggregate), videos


def _variables(weights_folder: Path) -> dict[str, str]:
    """Environment variables of VBench's process: all weights in one folder, no downloads."""
    return {
        **os.environ,
        "VBENCH_CACHE_DIR": str(weights_folder),
        "TORCH_HOME": str(weights_folder / TORCH_HOME),
        "HF_HOME": str(weights_folder / HUGGING_FACE_HOME),
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        # The checkpoints are too old for torch's default of weights_only. The user put them there.
        "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "1",
        "PYTHONUNBUFFERED": "1",
    }


def _ending(code: int) -> str:
    return f"VBench was killed by signal {-code}" if code < 0 else "VBench failed"


def _last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return lines[-1].strip() if lines else "no message"


def _some(names: list[str]) -> str:
    """The first few names as text."""
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(map(repr, names[:_NAMED])) + more
