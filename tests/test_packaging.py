"""What an installed copy holds."""

import ast
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "xattn_video"
# LPIPS tells without torchvision; VBench has an environment of its own.
NOT_DECLARED = {"block_sparse_attn", "torchvision", "vbench"}


@pytest.fixture(scope="module")
def pyproject():
    if sys.version_info < (3, 11):
        pytest.skip("tomllib came with Python 3.11")
    import tomllib

    return tomllib.loads((ROOT / "pyproject.toml").read_text())


@pytest.fixture(scope="module")
def setuptools_table(pyproject):
    return pyproject["tool"]["setuptools"]


def data_files():
    return {
        path
        for path in PACKAGE.rglob("*")
        if path.is_file() and path.suffix not in (".py", ".pyc") and not path.is_symlink()
    }


def test_every_data_file_is_shipped(setuptools_table):
    """An editable install has them all, so that a glob that misses one shows nowhere else."""
    shipped = set()
    for package, patterns in setuptools_table["package-data"].items():
        folder = ROOT / package.replace(".", "/")
        assert (folder / "__init__.py").is_file()
        shipped.update(path for pattern in patterns for path in folder.glob(pattern))
    assert data_files() <= shipped


def test_the_package_alone_is_shipped(setuptools_table):
    assert setuptools_table["packages"]["find"]["include"] == ["xattn_video", "xattn_video.*"]


def requirements(pyproject, *extras) -> set[str]:
    """Names that are installed with these extras and those they name."""
    optional = pyproject["project"]["optional-dependencies"]
    lines = list(pyproject["project"]["dependencies"])
    for extra in extras:
        lines += optional[extra]
        named = [line for line in optional[extra] if line.startswith("xattn-video[")]
        lines += requirements(pyproject, *(n[len("xattn-video[") : -1] for n in named))
    return {re.split(r"[^\w-]", line)[0] for line in lines} - {"xattn-video"}


def test_diffusers_knows_the_dtype_argument(pyproject):
    """The README and the loading say `dtype=`, which came with 0.42."""
    video = pyproject["project"]["optional-dependencies"]["video"]
    (diffusers,) = [line for line in video if line.startswith("diffusers")]
    floor = tuple(map(int, diffusers.removeprefix("diffusers>=").split(".")))
    assert floor >= (0, 42)


def test_the_operator_installs_with_torch_and_triton_alone(pyproject):
    assert requirements(pyproject) == {"torch", "triton"}


def test_the_readmes_two_commands_need_no_other_extra(pyproject):
    assert requirements(pyproject, "video", "metrics") <= requirements(pyproject, "dev")


@pytest.mark.parametrize(
    ("folder", "extras"),
    [("xattn_video", ["video", "metrics", "hopper"]), ("eval_vbench", ["video", "metrics"])],
)
def test_every_package_that_is_imported_is_declared(folder, extras, pyproject):
    imported = set()
    for path in (ROOT / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                imported.update(alias.name.split(".")[0] for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                imported.add((node.module or "").split(".")[0])
    ours = {"xattn_video", "eval_vbench"}
    declared = {name.replace("-", "_") for name in requirements(pyproject, *extras)}
    # imageio-ffmpeg is imageio's own extra; pillow and flash-attn-4 are imported as these.
    declared |= {"imageio_ffmpeg", "PIL", "flash_attn"}
    assert imported - ours - set(sys.stdlib_module_names) - declared <= NOT_DECLARED


def test_every_folder_of_code_is_a_package():
    folders = {path.parent for path in PACKAGE.rglob("*.py")}
    assert [folder for folder in folders if not (folder / "__init__.py").is_file()] == []


def test_the_demo_model_is_small():
    sizes = [path.stat().st_size for path in (PACKAGE / "pipelines/demo/model").rglob("*.*")]
    assert sizes
    assert max(sizes) <= 15e6
    assert sum(sizes) <= 25e6
