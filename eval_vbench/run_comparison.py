"""Compares a dense run with sparse runs; the results are plain numbers for a report."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, median
from typing import Any

from eval_vbench.dimensions import Totals, totals
from eval_vbench.prompts import DEMO_SUITE, VideoItem, load_suite
from eval_vbench.run_folder import RunFolder
from eval_vbench.score_files import Score, read_scores
from xattn_video.measure.comparison_rows import over_measured
from xattn_video.measure.paired_difference import Difference, paired_difference
from xattn_video.pipelines.item_folder import describe_differences

# VBench, other than VBench-Long, is designed for videos shorter than this.
VBENCH_SECONDS = 5.0
VBENCH_VIDEOS_PER_PROMPT = 5


@dataclass(frozen=True, slots=True)
class CompleteRun:
    """A complete run, read from its folder."""

    folder: RunFolder
    settings: dict[str, Any]
    items: tuple[VideoItem, ...]
    records: dict[str, dict[str, Any]]
    scores: dict[str, Score]

    @property
    def label(self) -> str:
        """The name of the run in tables."""
        sparse = self.settings["sparse"]
        if sparse is None:
            name = self.folder.path.resolve().name
            return "dense" if name == "dense" else f"dense ({name})"
        kind = "threshold" if sparse.get("density") is None else "density"
        share = sparse[kind]
        value = "schedule" if isinstance(share, dict) else f"{share:g}"
        name = "tau" if kind == "threshold" else kind
        return f"{name} {value}, stride {sparse['stride']}, warm-up {sparse['warmup_steps']}"


@dataclass(frozen=True, slots=True)
class DimensionRow:
    """One dimension: VBench's scores of both runs, and the difference over shared videos."""

    dimension: str
    dense: float
    sparse: float
    difference: Difference | None


@dataclass(frozen=True, slots=True)
class Measures:
    """Means over the videos of a run; None for what was not measured.

    Seconds are medians, so that a first video that compiles or loads has no effect.
    """

    videos: int
    psnr: float | None
    ssim: float | None
    lpips: float | None
    relative_vmaf: float | None
    density: float | None
    seconds: float
    speedup: float | None
    step_speedup: float | None
    peak_memory_gib: float | None


@dataclass(frozen=True, slots=True)
class SparseResult:
    """One sparse run against the dense one.

    Attributes:
        run: The run.
        dimensions: The dimensions that both runs were scored on.
        totals: The totals of both, dense first; None unless all dimensions are present.
        measures: Fidelity and cost.
        checks: {name of the demo model's prompt check: share right}.
    """

    run: CompleteRun
    dimensions: tuple[DimensionRow, ...]
    totals: tuple[Totals, Totals] | None
    measures: Measures
    checks: dict[str, float]


def load_run(path: RunFolder) -> CompleteRun:
    """Read a complete run.

    Raises:
        ValueError: The folder holds no run, or videos are missing.
    """
    settings, items = path.settings(), path.expected_items()
    records = {item.key: record for item in items if (record := path.record(item.key)) is not None}
    missing = [item for item in items if item.key not in records]
    if missing:
        failed = sum(path.failure(item.key) is not None for item in missing)
        raise ValueError(
            f"{str(path.path)!r} lacks {len(missing)} of {len(items)} videos ({failed} failed, "
            f"{len(missing) - failed} missing or changed), such as {missing[0].file_name!r}; run "
            "eval_vbench.generate again with the settings in settings.json to generate them."
        )
    return CompleteRun(path, settings, tuple(items), records, read_scores(path))


def check_comparable(dense: CompleteRun, sparse: CompleteRun) -> None:
    """Check that the two runs differ only in their attention.

    Raises:
        ValueError: They differ in something else, or the first run is not dense.
    """
    if dense.settings["sparse"] is not None:
        raise ValueError(
            f"{str(dense.folder.path)!r} is sparse ({dense.label}); --dense takes a run that was "
            "generated with --dense."
        )
    ours, theirs = ({**run.settings, "sparse": None} for run in (dense, sparse))
    different = describe_differences(ours, theirs)
    if different:
        raise ValueError(
            f"{str(dense.folder.path)!r} and {str(sparse.folder.path)!r} cannot be compared, they "
            f"differ in {'; '.join(different)}; generate one of them again with the other's "
            "settings."
        )


def compare(
    dense: CompleteRun, sparse: CompleteRun, fidelity: Mapping[str, dict[str, Any]]
) -> SparseResult:
    """All results of one sparse run.

    Args:
        dense, sparse: Comparable runs.
        fidelity: The result of `measure_fidelity`; empty if it was not measured.
    """
    prompts = {item.file_name: item.prompt.name for item in dense.items}
    rows = tuple(
        DimensionRow(
            name,
            score.score,
            sparse.scores[name].score,
            paired_difference(score.videos, sparse.scores[name].videos, prompts),
        )
        for name, score in dense.scores.items()
        if name in sparse.scores
    )
    both = [totals({name: s.score for name, s in run.scores.items()}) for run in (dense, sparse)]
    return SparseResult(
        run=sparse,
        dimensions=rows,
        totals=(both[0], both[1]) if both[0] and both[1] else None,
        measures=measures_of(sparse, dense, fidelity),
        checks=shares_right(sparse),
    )


def measures_of(
    run: CompleteRun,
    dense: CompleteRun | None = None,
    fidelity: Mapping[str, dict[str, Any]] | None = None,
) -> Measures:
    """Fidelity and cost of a run; speed-ups and fidelity need the dense run."""
    pairs = list((fidelity or {}).values())
    seconds = median(_values(run, "seconds"))
    step = over_measured(median, _values(run, "seconds_per_sparse_step"))
    dense_seconds = dense_step = None
    if dense is not None and devices(run) == devices(dense):
        dense_seconds = median(_values(dense, "seconds"))
        dense_step = over_measured(median, _values(dense, "seconds_per_dense_step"))
    vmaf = [
        100 * pair["vmaf"] / pair["vmaf_self"]
        for pair in pairs
        if pair.get("vmaf") is not None and pair.get("vmaf_self")
    ]
    return Measures(
        videos=len(run.items),
        psnr=over_measured(mean, [pair["psnr"] for pair in pairs]),
        ssim=over_measured(mean, [pair["ssim"] for pair in pairs]),
        lpips=over_measured(mean, [pair.get("lpips") for pair in pairs]),
        relative_vmaf=over_measured(mean, vmaf),
        density=over_measured(mean, _values(run, "density")),
        seconds=seconds,
        speedup=None if dense_seconds is None else dense_seconds / seconds,
        step_speedup=dense_step / step if dense_step and step else None,
        peak_memory_gib=over_measured(max, _values(run, "peak_memory_gib")),
    )


def shares_right(run: CompleteRun) -> dict[str, float]:
    """{name of the demo model's prompt check: share right}; empty for another model's run."""
    judged: dict[str, list[bool]] = {}
    for record in run.records.values():
        for name, right in (record["checks"] or {}).items():
            judged.setdefault(name, []).extend(right)
    return {name: sum(right) / len(right) for name, right in judged.items()}


def devices(run: CompleteRun) -> set[str]:
    """The devices that generated the videos."""
    return {record["device"] for record in run.records.values()}


def caveats(dense: CompleteRun, results: Sequence[SparseResult]) -> list[str]:
    """What readers must know before they compare these numbers with others."""
    settings = dense.settings
    reasons = []
    if settings["suite"] == DEMO_SUITE:
        reasons.append("the prompts are the demo model's own")
    elif settings["num_prompts"] < len(load_suite(settings["suite"])):
        whole = len(load_suite(settings["suite"]))
        reasons.append(f"{settings['num_prompts']} of {whole} prompts")
    if settings["videos_per_prompt"] < VBENCH_VIDEOS_PER_PROMPT:
        reasons.append(
            f"{settings['videos_per_prompt']} video for each prompt instead of "
            f"{VBENCH_VIDEOS_PER_PROMPT}"
        )
    reasons.append("temporal_flickering without VBench's 25 videos per prompt and static filter")
    found = [f"Not comparable to the VBench leaderboard: {'; '.join(reasons)}."]
    seconds = settings["video"]["num_frames"] / settings["fps"]
    if seconds >= VBENCH_SECONDS:
        found.append(
            f"The videos are longer than 5 s: {settings['video']['num_frames']} frames at "
            f"{settings['fps']} fps are {seconds:.2f} s. VBench is designed for shorter videos "
            "(VBench-Long for longer ones), so compare the differences, not the scores."
        )
    if any(devices(result.run) != devices(dense) for result in results):
        names = sorted(set.union(devices(dense), *(devices(result.run) for result in results)))
        found.append(
            f"The runs were made on different devices ({', '.join(names)}); their times are not "
            "compared."
        )
    return found


def _values(run: CompleteRun, name: str) -> list[float]:
    """The values of a name in all records, without None."""
    return [record[name] for record in run.records.values() if record[name] is not None]
