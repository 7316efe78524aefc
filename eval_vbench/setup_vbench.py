"""Create the environment that VBench needs.

python -m eval_vbench.setup_vbench vbench-env
"""

import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer

from eval_vbench.preflight import NEEDS, missing_modules, probe_environment
from xattn_video.options.command import CONTEXT_SETTINGS, command
from xattn_video.reporting.console import output_console
from xattn_video.reporting.endings import ErrorsToExitCodes, OneLineCommand

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

REQUIREMENTS = Path(__file__).with_name("requirements-vbench.txt")
# The last Python for which the tokenizers of transformers 4.33.2 have a wheel.
_NEWEST_PYTHON = (3, 11)


@app.command(
    cls=OneLineCommand,
    context_settings=CONTEXT_SETTINGS,
    epilog="Example: python -m eval_vbench.setup_vbench vbench-env --python python3.11",
)
@command
def main(
    folder: Annotated[Path, typer.Argument(help="The environment's folder.")],
    errors: ErrorsToExitCodes,
    python: Annotated[
        Path, typer.Option(help="Python 3.11 or older to create the environment with.")
    ] = Path(sys.executable),
) -> None:
    """Create an environment with VBench; takes several GB and several minutes."""
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{str(folder)!r} is not empty; remove it, or give another folder.")
    _check_version(python)
    errors.running = True
    subprocess.run([str(python), "-m", "venv", str(folder)], check=True)
    inside = folder / "bin" / "python"
    subprocess.run(
        [str(inside), "-m", "pip", "install", "--requirement", str(REQUIREMENTS)], check=True
    )
    environment = probe_environment(inside)
    ready = [name for name in NEEDS if not missing_modules(name, environment)]
    console = output_console()
    console.print(f"python     {inside}", soft_wrap=True)
    console.print(f"modules    there for {len(ready)} of {len(NEEDS)} dimensions")
    console.print("next       python -m eval_vbench.score shows what else is missing")


def _check_version(python: Path) -> None:
    """Raise ValueError unless VBench's pinned packages have wheels for this Python."""
    code = "import sys; print(*sys.version_info[:2])"
    try:
        answer = subprocess.run(
            [str(python), "-c", code], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError) as error:
        raise ValueError(f"cannot run {str(python)!r}: {error}; give --python.") from None
    version = tuple(map(int, answer.stdout.split()))
    if version > _NEWEST_PYTHON:
        raise ValueError(
            f"{str(python)!r} is Python {version[0]}.{version[1]}; vbench 0.1.5 needs "
            "transformers 4.33.2, which has no wheels after 3.11: give a Python 3.11 with "
            "--python."
        )


if __name__ == "__main__":
    app()
