"""The report as a web page: the same tables, and synchronised pairs of videos."""

from collections.abc import Iterator, Sequence

from eval_vbench.report_page import ReportTables
from eval_vbench.run_comparison import CompleteRun, SparseResult, caveats
from xattn_video.measure.clips import read_clip
from xattn_video.measure.comparison_web import MOST_PLAYERS, settings_facts
from xattn_video.measure.page_players import compared_player
from xattn_video.reporting.web_page import Picture, Player, WebPage


def report_web_page(
    dense: CompleteRun,
    results: Sequence[SparseResult],
    notes: Sequence[str],
    plot: bytes | None,
    command: str,
    with_videos: bool,
) -> WebPage:
    """The report as a page.

    Args:
        dense: The dense run, which is the reference.
        results: The results of the sparse runs.
        notes: What could not be measured.
        plot: A PNG of the scores, if there is one.
        command: The command that made the report.
        with_videos: Whether to show videos, which needs lossless copies.
    """
    settings, tables = dense.settings, ReportTables(dense, results)
    video = settings["video"]
    sections = [("Fidelity and cost", tables.measures)]
    if tables.checks is not None:
        sections.append(("Prompts still followed", tables.checks))
    remarks = []
    for result in results:
        table, remark = tables.dimensions(result)
        sections += [(f"VBench: {result.run.label}", table)] * bool(table.rows)
        remarks += [remark] * bool(remark)
    if tables.paper is not None:
        sections.append(("The paper's figures", tables.paper[0]))
        remarks.append(f"Paper: {tables.paper[1]}")
    return WebPage(
        title="Dense against sparse",
        lead=f"{settings['model']}, {video['width']}x{video['height']}, {video['num_frames']} "
        f"frames, {video['num_inference_steps']} steps, suite {settings['suite']}, "
        f"{len(dense.items)} videos a run. {tables.origin}",
        players=tuple(_players(dense, results)) if with_videos else (),
        tables=tuple(sections),
        facts=tuple(
            (f"Settings of {result.run.label}", settings_facts(result.run.settings["sparse"]))
            for result in results
            if result.run.settings["sparse"] is not None
        ),
        pictures=() if plot is None else (Picture("Scores of the runs", plot),),
        notes=(*caveats(dense, results), *notes, *dict.fromkeys(remarks)),
        command=command,
    )


def _players(dense: CompleteRun, results: Sequence[SparseResult]) -> Iterator[Player]:
    """A player for each of the first videos of the suite, in each run."""
    pairs = [(item, result) for item in dense.items for result in results][:MOST_PLAYERS]
    for item, result in pairs:
        clips = [read_clip(run.folder.lossless_video(item)) for run in (dense, result.run)]
        title = f"{item.prompt.name} (seed {item.seed})"
        title += f", {result.run.label}" if len(results) > 1 else ""
        yield compared_player(title, clips[0], result.run.label, clips[1])
