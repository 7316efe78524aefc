"""What an installed copy holds."""

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "xattn_video"


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


def test_diffusers_knows_the_dtype_argument(pyproject):
    """The README and the loading say `dtype=`, which came with 0.42."""
    (diffusers,) = [d for d in pyproject["project"]["dependencies"] if d.startswith("diffusers")]
    floor = tuple(map(int, diffusers.removeprefix("diffusers>=").split(".")))
    assert floor >= (0, 42)


def test_every_folder_of_code_is_a_package():
    folders = {path.parent for path in PACKAGE.rglob("*.py")}
    assert [folder for folder in folders if not (folder / "__init__.py").is_file()] == []


def test_the_demo_model_is_small():
    sizes = [path.stat().st_size for path in (PACKAGE / "pipelines/demo/model").rglob("*.*")]
    assert sizes
    assert max(sizes) <= 15e6
    assert sum(sizes) <= 25e6
