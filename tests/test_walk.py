"""How far it is from a layer to its kernel; `python -m pytest tests/test_walk.py -s` prints it."""

import sys
from pathlib import Path

from hunyuan import run, with_processor

import xattn_video

PACKAGE = Path(xattn_video.__file__).parent


def walk_of_one_layer() -> list[tuple[str, str]]:
    """(file, function) of the package's calls, from the processor to the backend's forward."""
    transformer, processor = with_processor()
    run(transformer)
    calls: list[tuple[str, str]] = []
    finished = False

    def watch(frame, event, _):
        nonlocal finished
        code = frame.f_code
        if finished or event != "call" or not code.co_filename.startswith(f"{PACKAGE}/"):
            return
        call = Path(code.co_filename).relative_to(PACKAGE).as_posix(), code.co_name
        # The token refiner's layers end in Diffusers' own processor; the first joint one counts.
        if calls or _is_joint(processor, frame):
            calls.append(call)
        finished = call == ("backends/torch_gather.py", "forward")

    sys.setprofile(watch)
    try:
        run(transformer)
    finally:
        sys.setprofile(None)
    assert finished
    return calls


def _is_joint(processor, frame) -> bool:
    given = frame.f_locals
    return (
        frame.f_code.co_name == "__call__"
        and given.get("self") is processor
        and given["encoder_hidden_states"] is not None
    )


def test_a_sparse_layer_is_a_short_walk():
    calls = walk_of_one_layer()
    files = list(dict.fromkeys(file for file, _ in calls))
    print(f"\n{len(calls)} calls in {len(files)} files")
    for file, function in calls:
        print(f"  {file}: {function}")
    assert calls[0] == ("processors/processor.py", "__call__")
    assert len(calls) <= 25
    assert len(files) <= 6
