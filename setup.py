"""Makes the README's links absolute for PyPI. Everything else is in pyproject.toml."""

import re
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent
_LINK = re.compile(r"(!?)\[([^\]]*)\]\((?!https?://|#)([^)\s]+)\)")


def long_description(readme: str, pyproject: str) -> str:
    """The README with absolute links, or without links if the repository's URL is unknown."""
    stated = re.search(r'^Repository = "(.+?)/?"$', pyproject, re.MULTILINE)

    def replace(link: re.Match[str]) -> str:
        image, text, path = link.groups()
        if stated is None:
            return "" if image else text
        return f"{image}[{text}]({stated[1]}/{'raw' if image else 'blob'}/main/{path})"

    return _LINK.sub(replace, readme)


if __name__ == "__main__":
    setup(
        long_description=long_description(
            (ROOT / "README.md").read_text(encoding="utf-8"),
            (ROOT / "pyproject.toml").read_text(encoding="utf-8"),
        ),
        long_description_content_type="text/markdown",
    )
