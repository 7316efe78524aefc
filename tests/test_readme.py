"""What the README and docs/usage.md show works: code, commands and files. Links resolve."""

import ast
import json
import re
import shlex
from pathlib import Path

import pytest
import torch
from command_line import run_cli
from diffusers import HunyuanVideoPipeline
from page_code import SMALL, blocks_of, run_snippets
from typer.testing import CliRunner

import xattn_video
from xattn_video import ThresholdSchedule, UnsupportedModelError
from xattn_video.cli import app
from xattn_video.pipelines.source import check_supported, find_model
from xattn_video.processors.binding import family_of
from xattn_video.processors.families import FAMILIES

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]
PAGES += sorted((ROOT / "docs").rglob("*.md")) + sorted((ROOT / "benchmarks").glob("*.md"))
README, USAGE = ROOT / "README.md", ROOT / "docs/usage.md"


def blocks(language: str, *pages: Path) -> list[str]:
    return [code for page in pages or (README, USAGE) for code in blocks_of(language, page)]


def commands() -> list[list[str]]:
    lines = [line for block in blocks("bash") for line in block.splitlines()]
    return [shlex.split(line, comments=True) for line in lines if line.startswith("xattn-video")]


@pytest.mark.parametrize("code", blocks("python"))
def test_its_code_imports_names_that_exist(code):
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.ImportFrom) and node.module == "xattn_video":
            for alias in node.names:
                assert alias.name in xattn_video.__all__


@pytest.mark.parametrize("page", [README, USAGE], ids=lambda page: page.name)
def test_its_snippets_run_one_after_the_other(page, tiny_hub):
    """As they stand, but on the tiny pipeline and a video of its size."""
    namespace = run_snippets(page)
    assert namespace["processor"].report().steps == tuple(range(8))


def test_the_demo_models_snippet_runs_sparse(monkeypatch):
    run = HunyuanVideoPipeline.__call__
    monkeypatch.setattr(
        HunyuanVideoPipeline,
        "__call__",
        lambda *words, **options: run(*words, **(options | SMALL)),
    )
    names = run_snippets(ROOT / "docs/demo_model.md")
    assert names["processor"].report().sparse_steps == (5, 6, 7)
    assert len(names["video"]) == 9


@pytest.mark.parametrize("command", commands(), ids=" ".join)
def test_its_commands_have_the_options(command):
    name, options = command[1], [word for word in command[2:] if word.startswith("--")]
    shown = CliRunner().invoke(app, [name, "--help"], env={"COLUMNS": "200"})
    assert shown.exit_code == 0
    for option in options:
        assert option in shown.stdout


def test_readme_and_messages_name_the_same_models(tmp_path):
    index = tmp_path / "model_index.json"
    index.write_text('{"_class_name": "HunyuanVideoImageToVideoPipeline"}')
    with pytest.raises(UnsupportedModelError) as of_the_processor:
        family_of(torch.nn.Linear(1, 1))
    with pytest.raises(UnsupportedModelError) as of_the_command_line:
        check_supported(find_model(str(tmp_path)))
    (family,) = FAMILIES
    texts = [str(of_the_processor.value), str(of_the_command_line.value)]
    for text in [*texts, " ".join(README.read_text(encoding="utf-8").split())]:
        assert "HunyuanVideoTransformer3DModel" in text
        for model in family.covers:
            assert model in text
    assert "loads text-to-video pipelines only" in texts[1]


def test_its_schedule_is_one():
    (schedule,) = map(json.loads, blocks("json"))
    assert ThresholdSchedule.from_dict(schedule).threshold(49) == 0.98


def test_its_schedule_names_layers_and_heads_that_the_demo_model_has(tmp_path):
    (text,) = blocks("json")
    (tmp_path / "plan.json").write_text(text)
    words = ("--model=demo", "--device=cpu", f"--schedule={tmp_path / 'plan.json'}")
    code, _, err = run_cli("plan", *words)
    assert (code, err) == (0, "")


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
