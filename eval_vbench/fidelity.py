"""Fidelity of sparse videos to dense videos: PSNR, SSIM and other available measures."""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eval_vbench.prompts import VideoItem
from eval_vbench.run_folder import RunFolder
from xattn_video.files import read_record, write_json
from xattn_video.pipelines.item_folder import settings_hash

if TYPE_CHECKING:
    from xattn_video.measure.similarity import Scorer


def measure_fidelity(
    dense: RunFolder,
    sparse: RunFolder,
    items: Sequence[VideoItem],
    scorer: "Scorer",
    say: Callable[[str], None],
) -> dict[str, dict[str, Any]]:
    """Measure every pair of videos; earlier measurements are read from files.

    Args:
        dense, sparse: Complete runs with lossless copies.
        items: The videos of both runs.
        scorer: Measures the pairs.
        say: Function that prints a line of progress.

    Returns:
        {key of the item: its measures}.

    Raises:
        ValueError: A copy is broken.
    """
    from xattn_video.measure.clips import read_clip

    folder = sparse.path / "fidelity" / settings_hash(dense.settings())[:16]
    found: dict[str, dict[str, Any]] = {}
    for number, item in enumerate(items):
        key = {
            "reference": _digest(dense, item),
            "candidate": _digest(sparse, item),
            "missing": sorted(scorer.missing),
        }
        file = folder / f"{item.key}.json"
        measures = _read(file, key)
        if measures is None:
            clips = (read_clip(run.lossless_video(item)) for run in (dense, sparse))
            measures = asdict(scorer.score(*clips))
            write_json(file, {**key, "measures": measures})
            say(f"{sparse.path.name}: {number + 1}/{len(items)} pairs measured")
        found[item.key] = measures
    return found


def _digest(run: RunFolder, item: VideoItem) -> str:
    """The digest of a lossless copy, from its record."""
    record = run.record(item.key)
    assert record is not None
    return str(record["files"][f"lossless/{item.key}.mkv"]["sha256"])


def _read(file: Path, key: dict[str, Any]) -> dict[str, Any] | None:
    """The measures in a file; None unless they are complete and belong to these two videos."""
    content = read_record(file, "measures", *key)
    if content is None or any(content[name] != key[name] for name in key):
        return None
    return dict(content["measures"])
