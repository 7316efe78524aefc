"""A rank's lock on a run's folder."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from eval_vbench.run_folder import RunFolder

HOLD = """
import sys, time
from pathlib import Path
from eval_vbench.run_folder import RunFolder
with RunFolder(Path(sys.argv[1])).lock_rank(0, 1):
    print("held", flush=True)
    time.sleep(600)
"""


def test_a_killed_process_leaves_no_lock(tmp_path):
    run = RunFolder(tmp_path / "run")
    command = [sys.executable, "-c", HOLD, str(run.path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=Path(__file__).parents[1]) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"held\n"
        with (
            pytest.raises(ValueError, match="another process is generating into"),
            run.lock_rank(0, 1),
        ):
            pass
        # Another rank has a place of its own.
        with run.lock_rank(1, 2):
            pass
        other.send_signal(signal.SIGKILL)
        other.wait()
    with run.lock_rank(0, 1):
        pass
    with run.lock_rank(0, 1):
        pass
