"""The prompts to run, and the files to write for them."""

import hashlib
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from xattn_video.files import (
    RECORDS_FOLDER,
    check_output_path,
    check_run_folder,
    check_writable,
    read_record,
    write_json,
)
from xattn_video.options.command import knob
from xattn_video.pipelines.item_folder import ItemFolder
from xattn_video.pipelines.request import GenerationRequest
from xattn_video.pipelines.video import VIDEO_SUFFIXES
from xattn_video.reporting.console import written_name

_SLUG_LENGTH = 50
_DEFAULT_FOLDER = Path("videos")


@dataclass(frozen=True, slots=True)
class Outputs:
    """The files of a run: a video and optionally a plot for each prompt, a report and a page.

    Attributes:
        videos, plots, report, html: The files.
        is_default: Whether the video has the default name, for which no file is replaced.
        existing: The plots, the report and the page that were there before the run.
    """

    videos: tuple[Path, ...]
    plots: tuple[Path | None, ...]
    report: Path | None
    html: Path | None
    is_default: bool
    existing: frozenset[Path] = field(init=False)

    def __post_init__(self) -> None:
        named = filter(None, (*self.plots, self.report, self.html))
        existing = frozenset(path for path in named if path.exists())
        object.__setattr__(self, "existing", existing)

    def name_of(self, path: Path) -> str:
        """The name of a written plot, report or page, and whether another one was replaced."""
        return written_name(path, replaced=path in self.existing)


@dataclass(frozen=True, slots=True)
class Prompts:
    """The prompts as given on the command line."""

    prompt: str | None = knob("What the video shows.")
    prompts_file: Path | None = knob(
        "File with one prompt per line; lines that begin with # are comments.", reads=True
    )

    def read(self) -> list[str]:
        """The prompts from the option that was given.

        Raises:
            ValueError: Both options or none were given, or the file holds no prompt.
        """
        if (self.prompt is None) == (self.prompts_file is None):
            found = "none" if self.prompt is None else "both"
            raise ValueError(f"give --prompt or --prompts-file, got {found}.")
        return (
            [self.prompt] if self.prompt is not None else read_prompts(self.prompts_file or Path())
        )


class ResumableFolder(ItemFolder):
    """An output folder of a command; its records are in a subfolder.

    Args:
        path: The folder; its lock creates it.

    Raises:
        ValueError: The folder cannot be written.
    """

    def __init__(self, path: Path) -> None:
        check_run_folder(path)
        remedy = "give another --output, the same settings, or --overwrite to start over"
        super().__init__(path, path / RECORDS_FOLDER, remedy)


class PromptsFolder(ResumableFolder):
    """The videos of a prompts file; the file of a prompt has the same name in every run.

    Args:
        output: The folder as given, or None for the default.

    Raises:
        ValueError: It is not a folder, or cannot be written.
    """

    def __init__(self, output: Path | None) -> None:
        _check_is_folder(output, VIDEO_SUFFIXES, "output")
        super().__init__(output or _DEFAULT_FOLDER)
        self._names_file = self.settings_file.with_name("names.json")

    def claim(
        self,
        settings: dict[str, Any],
        requests: Sequence[GenerationRequest],
        videos: Sequence[Path],
        overwrite: bool,
    ) -> None:
        """Assign the folder to a run.

        Args:
            settings: Everything that the videos depend on, except the prompts.
            requests: The requests of the run.
            videos: The file of each request.
            overwrite: Replace these videos one by one; those of other prompts stay.

        Raises:
            ValueError: The folder belongs to a run with other settings.
        """
        keys = prompt_keys(requests)
        if overwrite and self.has_settings(settings):
            self.forget(keys)
        elif overwrite:
            self.start_over(settings)
        self.adopt(settings)
        # With its name kept, a video of a killed run is replaced and not numbered.
        names = zip(keys, (video.name for video in videos), strict=True)
        write_json(self._names_file, self._names() | dict(names))

    def videos(self, requests: Sequence[GenerationRequest]) -> list[Path]:
        """The file of each request: its file in an earlier run, or a new one."""
        names = self._names()
        taken = {self.path / name for name in names.values()}
        for key, request in zip(prompt_keys(requests), requests, strict=True):
            if key not in names:
                name = default_name(request.prompt, request.seed)
                taken.add(path := unused_path(self.path, name, ".mp4", taken))
                names[key] = path.name
        return [self.path / names[key] for key in prompt_keys(requests)]

    def check_output(self, path: Path, suffixes: tuple[str, ...], what: str = "output") -> None:
        """Check a file of a run as `check_output_path` does, also against the records to come."""
        records = self.settings_file.parent
        if Path(os.path.realpath(path)).is_relative_to(os.path.realpath(records)):
            raise ValueError(
                f"{what} cannot be written to {str(path)!r}: {str(records)!r} holds the records "
                "of the run; use another."
            )
        check_output_path(path, suffixes, what=what)

    def _names(self) -> dict[str, str]:
        """{key of a prompt: the name of its video}, from the list of names and from records."""
        recorded = {record["key"]: next(iter(record["files"])) for record in self._records()}
        listed = (read_record(self._names_file) or {}).items()
        return recorded | {key: name for key, name in listed if isinstance(name, str)}


def prompt_keys(requests: Sequence[GenerationRequest]) -> list[str]:
    """A key for each request; repeated prompts have different keys."""
    seen: Counter[str] = Counter()
    keys = []
    for request in requests:
        digest = hashlib.sha256(request.prompt.encode()).hexdigest()[:16]
        seen[digest] += 1
        keys.append(f"{digest}-{seen[digest]}")
    return keys


def choose_outputs(
    requests: Sequence[GenerationRequest],
    folder: PromptsFolder | None,
    output: Path | None,
    report: Path | None,
    plot: Path | None,
    html: Path | None,
) -> Outputs:
    """Name every file and check that it can be written; only named files are overwritten.

    Args:
        requests: One request for each video.
        folder: Folder of the videos of a prompts file, or None; with it ``plot`` is a folder.
        output, report, plot, html: The paths as given.

    Raises:
        ValueError: A file could not be written.
    """
    check = check_output_path
    if folder is not None:
        _check_is_folder(plot, (".png",), "plot")
        check = folder.check_output
        videos = folder.videos(requests)
    elif output is None:
        check_writable(Path())
        first = requests[0]
        videos = [unused_path(Path(), default_name(first.prompt, first.seed), ".mp4", set())]
    else:
        videos = [output]
    for video in videos:
        check(video, VIDEO_SUFFIXES)
    if report is not None:
        check(report, (".json",), what="report")
    plots: list[Path | None] = [plot] * len(videos)
    if plot is not None and folder is not None:
        plots = [plot / f"{video.stem}.png" for video in videos]
    for path in filter(None, plots):
        check(path, (".png",), what="plot")
    if html is not None:
        check(html, (".html",), what="html")
    is_default = folder is None and output is None
    return Outputs(tuple(videos), tuple(plots), report, html, is_default)


def _check_is_folder(path: Path | None, suffixes: tuple[str, ...], what: str) -> None:
    """Raise ValueError if a file is named but several files will be written."""
    if path is not None and path.suffix.lower() in suffixes:
        raise ValueError(
            f"with --prompts-file, the {what} must be a folder, got {str(path)!r}; "
            f"give a name without {path.suffix}."
        )


def read_prompts(file: Path) -> list[str]:
    """The prompts of a file, one per line; blank lines and lines that begin with # are skipped.

    Raises:
        ValueError: The file is missing, is not UTF-8 text, or holds no prompt.
    """
    try:
        # Editors on Windows put a byte order mark at the start of a file.
        text = file.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ValueError(
            f"cannot read the prompts file {str(file)!r}: {error.strerror}."
        ) from None
    except UnicodeDecodeError:
        raise ValueError(
            f"the prompts file {str(file)!r} is not UTF-8 text; save it as UTF-8."
        ) from None
    # Pasted text may have other separators of lines, which editors do not show as such.
    lines = [line.strip() for line in re.split(r"\r\n|\r|\n", text)]
    prompts = [line for line in lines if line and not line.startswith("#")]
    if not prompts:
        raise ValueError(
            f"the prompts file {str(file)!r} contains no prompt; expected one per line."
        )
    return prompts


def default_name(prompt: str, seed: int) -> str:
    """A file name without suffix, made from the prompt and the seed."""
    words = re.findall(r"\w+", prompt.lower())
    slug = ""
    for word in words:
        if slug and len(slug) + len(word) >= _SLUG_LENGTH:
            break
        slug = f"{slug}-{word}" if slug else word[:_SLUG_LENGTH]
    return f"{slug or 'video'}-seed{seed}"


@contextmanager
def reserved(path: Path) -> Iterator[Path]:
    """An empty file at ``path``, or with a number if another run has written ``path`` meanwhile.

    It is removed if it is still empty after an error.
    """
    name = path
    while True:
        try:
            name.touch(exist_ok=False)
            break
        except FileExistsError:
            name = unused_path(path.parent, path.stem, path.suffix, set())
    try:
        yield name
    except BaseException:
        if name.stat().st_size == 0:
            name.unlink()
        raise


def unused_path(folder: Path, name: str, suffix: str, taken: set[Path]) -> Path:
    """``name`` in ``folder``, with a number if it exists or is one of ``taken``."""
    path, number = folder / f"{name}{suffix}", 2
    while path.exists() or path in taken:
        path, number = folder / f"{name}-{number}{suffix}", number + 1
    return path
