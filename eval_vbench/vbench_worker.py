"""Runs in VBench's own environment, as a single file, because this package is not installed there.

python vbench_worker.py probe MODULE...               what is installed, as JSON on stdout
python vbench_worker.py score REQUEST.json            one dimension; VBench writes the result
"""

import importlib.metadata
import importlib.util
import json
import os
import shutil
import sys
import threading
import time
from pathlib import Path


def main() -> None:
    """Run the command that the first argument names."""
    command, *arguments = sys.argv[1:]
    if command == "probe":
        probe(arguments)
    else:
        score(Path(arguments[0]))


def probe(modules: list[str]) -> None:
    """Print versions and missing modules; imports none of them."""
    try:
        version = importlib.metadata.version("vbench")
    except importlib.metadata.PackageNotFoundError:
        version = None
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    python = ".".join(map(str, sys.version_info[:3]))
    json.dump({"python": python, "vbench": version, "missing": missing}, sys.stdout)


def end_with(parent: int, folder: Path) -> None:
    """End this process if the one that started it was killed, and remove the folder it left."""
    while os.getppid() == parent:
        time.sleep(1)
    shutil.rmtree(folder, ignore_errors=True)
    os._exit(1)


def score(request_file: Path) -> None:
    """Score one dimension through VBench's Python API.

    Its command line would start torch.distributed through a shell, ignore its exit code, and
    require CUDA.
    """
    watching = (os.getppid(), request_file.parent)
    threading.Thread(target=end_with, args=watching, daemon=True).start()
    request = json.loads(request_file.read_text(encoding="utf-8"))
    import torch
    from vbench import VBench

    device = request["device"] or ("cuda" if torch.cuda.is_available() else "cpu")
    bench = VBench(torch.device(device), request["full_info"], request["output"])
    bench.evaluate(
        videos_path=request["videos"],
        name=request["name"],
        dimension_list=[request["dimension"]],
        local=True,
        read_frame=False,
        mode=request["mode"],
        imaging_quality_preprocessing_mode="longer",
    )


if __name__ == "__main__":
    main()
