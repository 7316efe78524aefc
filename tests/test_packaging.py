"""What an installed copy holds."""

import ast
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

from eval_vbench import run_hunyuan

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
        for package in (PACKAGE, ROOT / "eval_vbench", ROOT / "eval_language")
        for path in package.rglob("*")
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


def test_the_package_and_its_evaluations_alone_are_shipped(setuptools_table):
    include = setuptools_table["packages"]["find"]["include"]
    assert include == ["xattn_video", "xattn_video.*", "eval_vbench", "eval_language"]


def test_the_script_is_reached_after_an_installation(pyproject, monkeypatch):
    assert pyproject["project"]["scripts"]["xattn-run-hunyuan"] == "eval_vbench.run_hunyuan:main"
    found = []
    monkeypatch.setattr(run_hunyuan.os, "execvpe", lambda *words: found.append(words))
    monkeypatch.setattr(sys, "argv", ["xattn-run-hunyuan", "--plan", "runs"])
    run_hunyuan.main()
    ((name, words, environment),) = found
    assert (name, words[2:]) == ("bash", ["--plan", "runs"])
    assert Path(words[1]).samefile(ROOT / "scripts/run_hunyuan.sh")
    assert environment["PATH"].split(":")[0] == str(Path(sys.executable).parent)
    monkeypatch.setattr(run_hunyuan, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match=r"pip install 'xattn-video\[metrics\]'"):
        run_hunyuan.main()


@pytest.fixture(scope="module")
def long_description():
    spec = importlib.util.spec_from_file_location("xattn_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.long_description


def test_the_links_of_the_readme_are_absolute_on_pypi(long_description):
    readme = (ROOT / "README.md").read_text()
    text = long_description(readme, '[project.urls]\nRepository = "https://example.org/o/x/"\n')
    assert "[docs/usage.md](https://example.org/o/x/blob/main/docs/usage.md)" in text
    assert "(https://example.org/o/x/raw/main/docs/images/demo.png)" in text
    links = re.findall(r"\]\(([^)\s]+)\)", text)
    assert links
    assert all(link.startswith("https://") for link in links)


def test_without_an_address_the_links_of_the_readme_are_plain_text(long_description):
    text = long_description("![a](b.png) [c](d.md#e) [f](https://g.org) [h](#i)", "")
    assert text == " c [f](https://g.org) [h](#i)"


def test_what_is_imported_through_the_links_of_a_clone_is_the_packages_own():
    code = """
import sys
from processors.families.hunyuan_video import HUNYUAN_VIDEO
from processors.processor import XAttnProcessor
from processors import XAttnProcessor as again
from pipelines.request import VideoSettings
import xattn_video.pipelines.request
import xattn_video.processors.families.hunyuan_video as family
assert XAttnProcessor is again is xattn_video.XAttnProcessor
assert HUNYUAN_VIDEO is family.HUNYUAN_VIDEO
assert VideoSettings is xattn_video.pipelines.request.VideoSettings
assert family.__spec__.name == family.__name__ == "xattn_video.processors.families.hunyuan_video"
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def requirements(pyproject, *extras) -> set[str]:
    """Names that are installed with these extras and those they name."""
    optional = pyproject["project"]["optional-dependencies"]
    lines = list(pyproject["project"]["dependencies"])
    for extra in extras:
        lines += optional[extra]
        named = [line for line in optional[extra] if line.startswith("xattn-video[")]
        inner = ",".join(n[len("xattn-video[") : -1] for n in named)
        lines += requirements(pyproject, *(name for name in inner.split(",") if name))
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
    [
        ("xattn_video", ["video", "metrics", "hopper"]),
        ("eval_vbench", ["video", "metrics"]),
        ("eval_language", ["video", "metrics", "harness", "video-understanding"]),
    ],
)
def test_every_package_that_is_imported_is_declared(folder, extras, pyproject):
    imported = set()
    for path in (ROOT / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                imported.update(alias.name.split(".")[0] for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                imported.add((node.module or "").split(".")[0])
    ours = {"xattn_video", "eval_vbench", "eval_language"}
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
