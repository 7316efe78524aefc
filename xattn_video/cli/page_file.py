"""Options for the web page of a command, and how it is opened."""

import webbrowser
from dataclasses import dataclass
from pathlib import Path

from xattn_video.options.command import knob
from xattn_video.reporting.console import print_message


@dataclass(frozen=True, slots=True)
class PageWish:
    """Whether the results are written as a web page, and whether a browser opens it."""

    html: bool = knob(
        "Write results.html, one self-contained page with everything.",
        True,
        panel="Files",
    )
    open: bool = knob("Open that page in the browser.", False, "--open", panel="Files")

    def __post_init__(self) -> None:
        if self.open and not self.html:
            raise ValueError("--open and --no-html cannot be combined; give only one.")


def open_in_browser(page: Path) -> None:
    """Open a page in a browser; if there is none, print the path."""
    if not webbrowser.open(page.resolve().as_uri()):
        print_message(f"no browser was found; copy {page} to a machine that has one")
