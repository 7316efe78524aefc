"""What docs/vbench.md shows must be there: commands have their options, figures are the data's."""

import json
import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from eval_vbench import generate, report, score, setup_vbench
from eval_vbench.dimensions import DATA

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/vbench.md").read_text(encoding="utf-8")
APPS = {
    "generate": generate.app,
    "report": report.app,
    "score": score.app,
    "setup_vbench": setup_vbench.app,
}


def commands() -> list[list[str]]:
    blocks = re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL)
    small = re.findall(r'small="(.*)"', PAGE)[0]
    lines = [line.strip() for block in blocks for line in block.splitlines()]
    return [shlex.split(line.replace("$small", small)) for line in lines if "eval_vbench." in line]


@pytest.mark.parametrize("command", commands(), ids=" ".join)
def test_its_commands_have_the_options(command):
    name = next(word.split(".")[1] for word in command if word.startswith("eval_vbench."))
    shown = CliRunner().invoke(APPS[name], ["--help"], env={"COLUMNS": "200"})
    assert shown.exit_code == 0
    for option in command:
        if option.startswith("--"):
            assert option in shown.stdout


def test_its_figures_are_the_papers_as_in_the_data():
    for row in json.loads((DATA / "paper.json").read_text())["rows"]:
        line = (
            f"| {row['threshold']:.2f} | {row['psnr']} | {row['ssim']} | {row['lpips']} | "
            f"{row['density']:.1%} |"
        )
        assert line in PAGE


def test_its_links_lead_somewhere():
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", PAGE):
        assert (ROOT / "docs" / target).exists(), target
