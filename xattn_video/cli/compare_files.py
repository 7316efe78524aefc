"""Compares two video files: `xattn-video compare --reference a.mkv --candidate b.mkv`."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from xattn_video import __version__
from xattn_video.cli.compare_results import check_new_results
from xattn_video.cli.page_file import PageWish, open_in_browser
from xattn_video.cli.record import typed_command
from xattn_video.files import write_json, write_text
from xattn_video.pipelines.video import check_encoders, write_video
from xattn_video.reporting.console import output_console, print_labelled, print_warning

if TYPE_CHECKING:
    from xattn_video.measure.clips import Clip
    from xattn_video.measure.similarity import Similarity
    from xattn_video.reporting.web_page import WebPage


@dataclass(frozen=True, slots=True)
class FilesJob:
    """Two videos to compare.

    Attributes:
        reference, candidate: The video files.
        folder: Where results.json and a side-by-side video are written; None writes nothing.
        overwrite: Whether the folder may already hold results.
        page: Whether a web page is written there, and opened.
    """

    reference: Path
    candidate: Path
    folder: Path | None
    overwrite: bool
    page: PageWish

    @classmethod
    def of(
        cls,
        reference: Path | None,
        candidate: Path | None,
        folder: Path | None,
        overwrite: bool,
        page: PageWish,
    ) -> "FilesJob":
        """The job from the options as given.

        Raises:
            ValueError: A file is not given, or a page must be opened and no folder is given.
        """
        if reference is None or candidate is None:
            lacking = "--reference" if reference is None else "--candidate"
            raise ValueError(
                f"--reference and --candidate must be given together; give {lacking} too."
            )
        if page.open and folder is None:
            raise ValueError("--open shows the page in the --output folder; give --output too.")
        return cls(reference, candidate, folder, overwrite, page)

    def check(self) -> None:
        """Check everything that could fail later.

        Raises:
            ValueError: A file is not a complete video, the two do not fit each other, or the
                folder cannot be used.
            MissingPackageError: torchmetrics or ffmpeg cannot be used.
        """
        from xattn_video.measure.clips import check_pair
        from xattn_video.measure.frames import require_torchmetrics

        require_torchmetrics()
        check_pair(*self._read())
        if self.folder is not None:
            check_new_results(self.folder, self.overwrite)
            check_encoders(self.folder, [".mp4"], fps=24)

    def run(self, as_json: bool = False) -> None:
        """Measure, print figures or JSON, and write the files."""
        from xattn_video.measure.similarity import VMAF_LEFT_OUT, Scorer

        clips = self._read()
        scorer = Scorer()
        similarity = scorer.score(*clips)
        for path, clip in zip((self.reference, self.candidate), clips, strict=True):
            if not clip.is_lossless:
                print_warning(
                    f"{str(path)!r} is {clip.codec}, which loses detail, and the scores include "
                    "that loss; to measure attention only, compare the .mkv files of --output."
                )
        lines = _lines(similarity)
        lines |= {name: f"not measured: {why}" for name, why in scorer.missing.items()}
        if similarity.plain:
            lines["VMAF"] = f"left out: {VMAF_LEFT_OUT}"
        written = {}
        if self.folder is not None:
            self._write(self.folder, clips, similarity, scorer.missing)
            written = {"results": str(self.folder)}
        lines |= written
        if as_json:
            record = asdict(similarity) | {"missing": scorer.missing} | written
            typer.echo(json.dumps(record, indent=2))
        else:
            print_labelled(output_console(), lines)
        if self.folder is not None and self.page.html:
            path = self.folder / "results.html"
            write_text(path, self._page(clips, lines).html())
            if self.page.open:
                open_in_browser(path)

    def _page(self, clips: "tuple[Clip, Clip]", lines: dict[str, str]) -> "WebPage":
        from xattn_video.measure.page_players import compared_player
        from xattn_video.reporting.web_page import WebPage

        names = self.reference.name, self.candidate.name
        return WebPage(
            title="Two videos and their difference",
            lead=f"{names[0]} is the reference, {names[1]} is compared with it.",
            players=(
                compared_player(" and ".join(names), clips[0], names[1], clips[1], names[0]),
            ),
            facts=(("Measured", lines),),
            command=typed_command(),
        )

    def _read(self) -> "tuple[Clip, Clip]":
        from xattn_video.measure.clips import read_clip

        return read_clip(self.reference), read_clip(self.candidate)

    def _write(
        self,
        folder: Path,
        clips: "tuple[Clip, Clip]",
        similarity: "Similarity",
        missing: dict[str, str],
    ) -> None:
        from xattn_video.measure.side_by_side import side_by_side

        frames = side_by_side(*clips, self.reference.name, self.candidate.name)
        write_video(folder / "side-by-side.mp4", frames, max(1, round(clips[0].fps)))
        write_json(
            folder / "results.json",
            {
                "command": typed_command(),
                "versions": {"xattn_video": __version__},
                "reference": {"file": str(self.reference), "codec": clips[0].codec},
                "candidate": {"file": str(self.candidate), "codec": clips[1].codec},
                "missing": missing,
                **asdict(similarity),
            },
        )


def _lines(similarity: "Similarity") -> dict[str, str]:
    """The measured values as text, by name."""
    count = similarity.num_frames
    identical = "all" if similarity.num_identical == count else similarity.num_identical
    lines = {
        "frames": f"{count}, {identical} identical",
        "PSNR": f"{similarity.psnr:.2f} dB, {similarity.lowest_psnr:.2f} dB in the worst frame",
        "SSIM": f"{similarity.ssim:.4f}",
    }
    if similarity.vmaf is not None:
        lines["VMAF"] = f"{similarity.vmaf:.1f}"
        if similarity.relative_vmaf is not None:
            lines["VMAF"] += f", {similarity.relative_vmaf:.1f}% of the reference's own"
    if similarity.lpips is not None:
        lines["LPIPS"] = f"{similarity.lpips:.4f}"
    return lines
