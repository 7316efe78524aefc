"""Installs a wheel into a fresh environment and gives its first commands, from an empty folder.

python .ci/check_wheel.py dist/xattn_video-0.1.0-py3-none-any.whl

The environment has what the wheel requires without extras; then it also gets the rest of this one.
Nothing is downloaded: packages are linked from this environment.
"""

import subprocess
import sys
import tempfile
import venv
from importlib.metadata import Distribution, distribution, distributions
from pathlib import Path

from packaging.requirements import Requirement

# The largest size allowed: two demo models and all other files.
_LARGEST_BYTES = 45e6
_OPERATOR = """
import torch, xattn_video
query = torch.randn(1, 2, 200, 64)
assert xattn_video.xattention(query, query, query, threshold=0.9).isfinite().all()
"""


def closure(name: str) -> dict[str, Distribution]:
    """A package and all that it requires without extras, by name."""
    found: dict[str, Distribution] = {}
    names = [name]
    while names:
        package = distribution(names.pop())
        if package.name in found:
            continue
        found[package.name] = package
        wanted = map(Requirement, package.requires or ())
        names += [r.name for r in wanted if r.marker is None or r.marker.evaluate({"extra": ""})]
    return found


def link(package: Distribution, site: Path) -> None:
    """Make a package importable from another environment."""
    if package.name == "xattn-video":
        return
    for file in package.files or ():
        top = file.parts[0]
        if top not in ("..", "__pycache__") and not (site / top).exists():
            (site / top).symlink_to(Path(str(package.locate_file(top))))


def environment(folder: Path, wheel: Path) -> tuple[Path, Path]:
    """A fresh environment with the wheel alone: where its commands and packages are."""
    venv.create(folder, with_pip=False)
    python = folder / "bin/python"
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site = Path(subprocess.check_output([python, "-c", code], text=True).strip())
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps"]
    subprocess.run([*pip, wheel], check=True)
    return folder / "bin", site


def run(empty: Path, *command: str | Path, fails: str = "") -> None:
    """Run a command, which must end well, or else say ``fails`` in one line."""
    done = subprocess.run(command, cwd=empty, capture_output=True, text=True, check=False)
    shown = " ".join([Path(command[0]).name, *map(str, command[1:])]).splitlines()[0]
    if bool(done.returncode) != bool(fails) or (fails and done.stderr.count("\n") != 1):
        sys.exit(f"{shown}: exit code {done.returncode}\n{done.stdout}{done.stderr}")
    if fails not in done.stderr:
        sys.exit(f"{shown}: expected {fails!r}, got {done.stderr}")
    print(f"ok: {shown}")


def main() -> None:
    """Check the wheel that the argument names."""
    wheel = Path(sys.argv[1]).resolve()
    size = wheel.stat().st_size
    if size > _LARGEST_BYTES:
        sys.exit(f"{wheel.name}: {size / 1e6:.1f} MB, expected {_LARGEST_BYTES / 1e6:g} or less")
    with tempfile.TemporaryDirectory() as folder:
        empty = Path(folder, "empty")
        empty.mkdir()
        commands, site = environment(Path(folder, "fresh"), wheel)
        for package in closure("xattn-video").values():
            link(package, site)
        run(empty, commands / "python", "-c", _OPERATOR)
        run(empty, commands / "xattn-video", fails="pip install 'xattn-video[video]'")
        run(empty, commands / "xattn-run-hunyuan", fails="pip install 'xattn-video[metrics]'")
        for package in distributions():
            link(package, site)
        run(empty, commands / "xattn-video", "plan", "--model", "demo", "-q")
        run(empty, commands / "xattn-video", "prefill", "--model", "demo", "--plan", "-q")
        run(empty, commands / "xattn-run-hunyuan", "--plan", "runs")


if __name__ == "__main__":
    main()
