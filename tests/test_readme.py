"""What the README shows must be there: its code compiles, its commands and files are read.

And the links of every page lead somewhere.
"""

import ast
import json
import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

import xattn_video
from xattn_video import ThresholdSchedule
from xattn_video.cli import app

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]
PAGES += sorted((ROOT / "docs").rglob("*.md")) + sorted((ROOT / "benchmarks").glob("*.md"))
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def commands() -> list[list[str]]:
    lines = [line for block in blocks("bash") for line in block.splitlines()]
    return [shlex.split(line, comments=True) for line in lines if line.startswith("xattn-video")]


@pytest.mark.parametrize("code", blocks("python"))
def test_its_code_imports_names_that_exist(code):
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.ImportFrom) and node.module == "xattn_video":
            for alias in node.names:
                assert alias.name in xattn_video.__all__


@pytest.mark.parametrize("command", commands(), ids=" ".join)
def test_its_commands_have_the_options(command):
    name, options = command[1], [word for word in command[2:] if word.startswith("--")]
    shown = CliRunner().invoke(app, [name, "--help"], env={"COLUMNS": "200"})
    assert shown.exit_code == 0
    for option in options:
        assert option in shown.stdout


def test_its_schedule_is_one():
    (schedule,) = map(json.loads, blocks("json"))
    assert ThresholdSchedule.from_dict(schedule).threshold(49) == 0.98


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_links_of_every_page_lead_somewhere(page):
    targets = re.findall(r"\]\((?!https?:)([^)\s]+)\)", page.read_text(encoding="utf-8"))
    for target in targets:
        file, _, heading = target.partition("#")
        found = page.parent / file if file else page
        assert found.exists(), target
        assert not heading or heading in anchors(found), target


def anchors(page: Path) -> set[str]:
    """What a heading is linked by: its letters, digits and hyphens, spaces as hyphens."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", text.lower()).replace(" ", "-") for text in headings}
