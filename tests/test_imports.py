"""Who may import whom, and what a plain import may pull in."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "xattn_video"
# What a backend is given and takes, which the folder below the operator may name.
VALUES = {"ops.blocks", "ops.problem"}
OPERATOR = {"errors", "kernels", "backends", "ops", *VALUES}
HOSTS = OPERATOR | {"checkpoint_files", "files", "policy", "processors", "top_level"}
MEASURED = HOSTS | {"pipelines", "measure", "reporting"}
LANGUAGE = OPERATOR | {"checkpoint_files", "files", "policy", "language"}

# part -> what it may import of the project (its own part included where it is a folder)
ALLOWED = {
    "errors": set(),
    "files": {"errors"},
    "checkpoint_files": set(),
    "top_level": set(),
    "kernels": {"kernels"},
    "ops.blocks": {"kernels"},
    "ops.problem": {"ops.blocks"},
    "backends": {"errors", "kernels", "backends", *VALUES},
    "ops": OPERATOR,
    "compat": OPERATOR,
    "__main__": {"cli"},
    "policy": OPERATOR | {"files", "policy"},
    "processors": HOSTS,
    "language": LANGUAGE,
    "enabling": HOSTS | LANGUAGE,
    "pipelines": HOSTS | {"pipelines"},
    "reporting": {"errors", "files", "reporting"},
    "measure": MEASURED,
    "options": HOSTS | LANGUAGE | {"pipelines", "reporting", "options"},
    "cli": MEASURED | LANGUAGE | {"options", "cli"},
    "eval_vbench": MEASURED | {"options", "eval_vbench"},
    "eval_language": MEASURED | LANGUAGE | {"options", "eval_language"},
    "benchmarks": MEASURED | LANGUAGE | {"benchmarks"},
    "scripts": MEASURED | {"scripts"},
}
SOURCES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")
ABOVE = sorted(
    path
    for name in ("eval_vbench", "eval_language", "benchmarks", "scripts")
    for path in (ROOT / name).rglob("*.py")
)
# Typed as `python -m folder.name`: a command's file is called as what it does.
COMMANDS = {"benchmarks/attention.py", "eval_vbench/generate.py", "eval_vbench/report.py"}


def part_of(module: str) -> str:
    """The part that a module such as `xattn_video.ops.blocks` belongs to."""
    names = module.split(".")
    if names[0] in ("demo_training", "language_training"):
        return "scripts"
    if names[0] != "xattn_video":
        return names[0]
    return ".".join(names[1:3]) if ".".join(names[1:3]) in ALLOWED else names[1]


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def imported_parts(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.add(node.module or "")
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    # A name imported from a module stands beside the module itself.
    return {part_of(name) for name in names if name != "xattn_video"} & set(ALLOWED)


@pytest.mark.parametrize("path", SOURCES + ABOVE, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_part_imports_only_what_it_may(path):
    assert imported_parts(path) <= ALLOWED[part_of(module_of(path))]


def test_no_two_files_share_a_name():
    """A reader who is told "plan" or "report" finds one file."""
    found: dict[str, list[str]] = {}
    for path in SOURCES + ABOVE:
        name = path.relative_to(ROOT).as_posix()
        if path.stem.startswith("__") or name in COMMANDS:
            continue
        found.setdefault(path.stem, []).append(name)
    assert {stem: names for stem, names in found.items() if len(names) > 1} == {}


def test_no_two_classes_share_a_name():
    found: dict[str, list[str]] = {}
    for path in SOURCES + ABOVE:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef):
                found.setdefault(node.name, []).append(path.relative_to(ROOT).as_posix())
    assert {name: paths for name, paths in found.items() if len(paths) > 1} == {}


def test_backends_never_import_each_other():
    shared = {"xattn_video.backends.probe", "xattn_video.backends"}
    for path in (PACKAGE / "backends").glob("*.py"):
        if path.stem != "table":
            found = {
                node.module
                for node in ast.walk(ast.parse(path.read_text()))
                if isinstance(node, ast.ImportFrom)
                and (node.module or "").startswith("xattn_video.backends")
            }
            assert found <= shared, path.name


def run_without(packages: set[str], code: str) -> subprocess.CompletedProcess[str]:
    """A fresh process in which none of the packages can be imported."""
    block = f"import sys\nsys.modules.update(dict.fromkeys({sorted(packages)}))\n"
    command = [sys.executable, "-c", block + code]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def extras() -> set[str]:
    """What an installation without extras may lack, as it is imported."""
    tomllib = pytest.importorskip("tomllib", reason="came with Python 3.11")

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = [line for extra in project["optional-dependencies"].values() for line in extra]
    names = {re.split(r"[^\w-]", line)[0].replace("-", "_") for line in lines}
    return names - {"flash_attn_4", "pillow", "xattn_video"} | {"PIL", "flash_attn", "triton"}


def test_the_operator_needs_torch_alone():
    code = """
import torch, xattn_video
out = xattn_video.xattention(*torch.randn(3, 1, 1, 256, 16), block_size=64)
assert out.shape == (1, 1, 256, 16)
"""
    run = run_without(extras(), code)
    assert run.returncode == 0, run.stderr


def test_the_command_line_without_its_packages_is_one_line():
    run = run_without(extras(), "from xattn_video.__main__ import main; main()")
    assert (run.returncode, run.stdout) == (1, "")
    (line,) = run.stderr.splitlines()
    assert line.startswith("error: the command line needs accelerate, diffusers, imageio,")
    assert "pip install 'xattn-video[video]'" in line


def test_the_command_line_runs_without_what_only_measures():
    packages = {"torchmetrics", "matplotlib", "hypothesis", "pytest"}
    words = ["plan", "--model=demo", "--dtype=float32"]
    code = f"sys.argv[1:] = {words}; from xattn_video.__main__ import main; main()"
    run = run_without(packages, code)
    assert (run.returncode, run.stderr) == (0, "")
    assert run.stdout.startswith("tokens ")


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
        assert not names & {"eval_vbench", "eval_language", "benchmarks", "scripts", "tests"}, (
            path.name
        )
