"""Runs of eval_vbench on the tiny pipeline, in this process."""

from pathlib import Path

import imageio.v3 as imageio
from typer.testing import CliRunner

from eval_vbench import generate

# 64x64x9 is 48 video tokens, in blocks of 16.
SMALL = [
    "--suite=demo",
    "--height=64",
    "--width=64",
    "--num-frames=9",
    "--num-inference-steps=2",
    "--device=cpu",
    "--dtype=float32",
]
SPARSE = [
    "--block-size=16",
    "--min-tokens=0",
    "--warmup-steps=1",
    "--threshold=0.8",
    "--scoring-precision=exact",
]


def invoke(app: object, *arguments: object) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a command."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


def make_run(
    folder: Path, model: Path, *arguments: object, prompts: int = 2
) -> tuple[int, str, str]:
    """Generate a run, or resume it."""
    return invoke(
        generate.app,
        f"--run={folder}",
        f"--model={model}",
        f"--num-prompts={prompts}",
        *SMALL,
        *arguments,
    )


def files_of(folder: Path) -> dict[str, bytes]:
    """Content of a run's videos: the mp4 files' bytes, the lossless copies' frames."""
    return {
        str(file.relative_to(folder)): (
            imageio.imread(file).tobytes() if file.suffix == ".mkv" else file.read_bytes()
        )
        for part in ("videos", "lossless", "unfinished")
        for file in (folder / part).rglob("*")
        if file.is_file()
    }
