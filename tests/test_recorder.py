"""The record of a generation: every pass, up to a number that a long generation needs."""

import pytest
import torch

from xattn_video.policy.decision import Decision
from xattn_video.policy.settings import SparseSettings
from xattn_video.processors import engine
from xattn_video.processors.layout import TokenLayout
from xattn_video.processors.recorder import ForwardPass, Recorder


@pytest.fixture
def forward():
    return ForwardPass(
        SparseSettings(block_size=8),
        Decision(None, ((0.5,),), 0.5, (False,), (True,)),
        TokenLayout(48, 16, (16,), torch.device("cpu")),
        None,
        "torch_gather",
        None,
        None,
        engine.sparse_attention,
        (),
    )


def record(recorder, forward, step, *kept):
    """One pass in which each layer computed so many blocks, or was skipped."""
    recorder.begin_forward(forward, step, 0, 1000.0, 2)
    for slot, count in zip(recorder.slots, kept, strict=True):
        if count is not None:
            slot.state, slot.kept = "sparse", torch.tensor(count)
    recorder.end_forward()


def test_a_skipped_layer_keeps_no_count_of_the_step_before(forward):
    """Else the counts of later layers would move into wrong places."""
    recorder = Recorder(("a", "b"), (torch.nn.Identity(), torch.nn.Identity()), engine.attend)
    record(recorder, forward, 0, 10, 20)
    record(recorder, forward, 1, None, 30)
    found = [[layer.kept for layer in run.layers] for run in recorder.report().forwards]
    assert found == [[10, 20], [None, 30]]


def test_the_latest_4096_passes_are_kept(forward):
    """An image-to-video model with guidance runs hundreds, a long video in sections thousands."""
    recorder = Recorder(("a",), (torch.nn.Identity(),), engine.attend)
    for step in range(4100):
        record(recorder, forward, step, None)
    steps = recorder.report().steps
    assert (steps[0], steps[-1], len(steps)) == (4, 4099, 4096)
