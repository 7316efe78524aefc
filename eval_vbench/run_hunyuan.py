"""`xattn-run-hunyuan`: runs the script of that name that ships with the package."""

import os
import sys
from importlib.util import find_spec
from pathlib import Path

SCRIPT = Path(__file__).with_suffix(".sh")
# Packages of the extra `metrics`, which the script's commands need; it installs the others too.
_NEEDED = ("diffusers", "filelock", "torchmetrics", "typer")


def main() -> None:
    """Replace this process by the script, with this Python first on its path."""
    missing = [name for name in _NEEDED if find_spec(name) is None]
    if missing:
        sys.exit(
            f"error: the script needs {', '.join(missing)}, not installed here; "
            "pip install 'xattn-video[metrics]' (in a clone: pip install -e '.[metrics]')."
        )
    folder = str(Path(sys.executable).parent)
    path = os.pathsep.join([folder, os.environ.get("PATH", os.defpath)])
    os.execvpe("bash", ["bash", str(SCRIPT), *sys.argv[1:]], {**os.environ, "PATH": path})


if __name__ == "__main__":
    main()
