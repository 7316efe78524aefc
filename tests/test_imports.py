"""Who may import whom, and what a plain import may pull in."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "xattn_video"
FOUNDATION = {"errors", "checks", "inputs"}
OPERATOR = FOUNDATION | {"forced", "registry", "scoring", "selection", "attention"}

# part -> what it may import from xattn_video (its own part included where it is a folder)
ALLOWED = {
    "errors": set(),
    "checks": set(),
    "inputs": set(),
    "forced": set(),
    "min_tokens": set(),
    "kernels": {"kernels"},
    "first_use": {"errors"},
    "backends": {"kernels", "errors", "first_use", "inputs"},
    "dense": {"kernels"},
    "scoring": {"checks", "inputs", "kernels"},
    "selection": {"checks", "forced", "inputs", "kernels"},
    "registry": {"errors", "inputs"},
    "attention": OPERATOR - {"attention"},
    "compat": OPERATOR,
    "schedule": {"errors"},
    "report": {"errors"},
    "processors": OPERATOR
    | {"dense", "kernels", "min_tokens", "schedule", "report", "processors"},
    "pipelines": OPERATOR | {"min_tokens", "schedule", "report", "processors", "pipelines"},
    "benchmark": OPERATOR | {"kernels", "benchmark"},
    "quality": {"errors", "schedule", "report", "processors", "pipelines", "quality"},
    "cli": OPERATOR
    | {"schedule", "report", "processors", "pipelines", "benchmark", "quality", "cli"},
}
SOURCES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def part_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_parts(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.add(node.module or "")
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    parts = [name.split(".") for name in names]
    known = set(ALLOWED)
    return {p[1] for p in parts if p[0] == "xattn_video" and len(p) > 1 and p[1] in known}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_part_imports_only_what_it_may(path):
    assert imported_parts(path) <= ALLOWED[part_of(path)]


def test_backends_never_import_each_other():
    for path in (PACKAGE / "backends").glob("*.py"):
        assert "xattn_video.backends" not in path.read_text(), path.name


def test_the_operator_needs_torch_alone():
    """A fresh process in which nothing beyond torch can be imported."""
    code = """
import sys
for name in ("diffusers", "transformers", "triton", "matplotlib", "flash_attn", "rich", "typer"):
    sys.modules[name] = None
import torch, xattn_video
out = xattn_video.xattention(*torch.randn(3, 1, 1, 256, 16), block_size=64)
assert out.shape == (1, 1, 256, 16)
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_the_public_names_are_all_there():
    import xattn_video

    for name in xattn_video.__all__:
        assert getattr(xattn_video, name) is not None


def test_the_package_knows_nothing_of_what_is_built_on_it():
    for path in SOURCES:
        names = {
            name.split(".")[0]
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Import | ast.ImportFrom)
            for name in (
                [node.module or ""]
                if isinstance(node, ast.ImportFrom)
                else [alias.name for alias in node.names]
            )
        }
        assert not names & {"eval_vbench", "benchmarks", "scripts", "tests"}, path.name
