"""Runs of the command line within the tests' own process."""

from typer.testing import CliRunner

from xattn_video.cli import app

# 64x64x9 is 48 video tokens, in blocks of 16.
SMALL = [
    "--height=64",
    "--width=64",
    "--num-frames=9",
    "--num-inference-steps=4",
    "--device=cpu",
    "--dtype=float32",
]
SPARSE = ["--block-size=16", "--min-tokens=0", "--warmup-steps=2", "--threshold=0.8"]


def run_cli(*arguments: object) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a command."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    return result.exit_code, result.stdout, result.stderr
