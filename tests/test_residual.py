"""A refresh keeps what the skipped blocks add to a layer's output, and later steps add it."""

from dataclasses import replace
from types import SimpleNamespace

import psutil
import pytest
import torch

from xattn_video.errors import ResidualMemoryError
from xattn_video.policy.decision import Decision
from xattn_video.policy.settings import SparseSettings
from xattn_video.processors import engine
from xattn_video.processors.kept import KeptByPass
from xattn_video.processors.layout import TokenLayout
from xattn_video.processors.recorder import ForwardPass, LayerSlot
from xattn_video.processors.residual import PassResiduals, Residual, choose_place

SETTINGS = SparseSettings(
    density=0.5, stride=4, block_size=8, min_tokens=0, warmup_steps=1, refresh_every=3
)


def keeping(place="auto") -> KeptByPass:
    return KeptByPass(replace(SETTINGS, residual=place), 1)


def attend(tensors, kept, refreshes, sparse=True, last=False):
    """The engine on its own, on a batch of two with uneven text."""
    slot = LayerSlot("layer")
    slot.reason = None if sparse else "warm-up"
    slot.threshold = torch.tensor(SETTINGS.density) if sparse or refreshes else None
    step = 1 + (kept.made.get("layer", 0) if kept else 0)
    due = step if refreshes else 0
    slot.forward = ForwardPass(
        SETTINGS,
        Decision(
            slot.reason, ((0.2, 0.2),), None, (refreshes,), (refreshes,), last, step=step, due=due
        ),
        TokenLayout(48, 16, (10, 3), torch.device("cpu")),
        torch.tensor([58, 51], dtype=torch.int32),
        "torch_gather",
        None,
        None,
        engine.sparse_attention,
        (),
        kept,
    )
    with torch.no_grad():
        return engine.attend(slot, *tensors, None)


def three_tensors():
    return torch.randn(3, 2, 64, 2, 16).mul(2).unbind()


def test_a_refresh_gives_dense_attention_and_the_next_step_too_within_8_bits():
    tensors = three_tensors()
    dense = attend(tensors, None, False, sparse=False)
    approximate = attend(tensors, None, False)
    kept = keeping()
    assert torch.equal(attend(tensors, kept, True), dense)
    found = attend(tensors, kept, False)
    largest = (dense - approximate).abs().amax(-1, keepdim=True)
    assert ((found - dense).abs() <= largest / 127 * 0.501 + 1e-6).all()
    # The residual is no trifle, and it is far more than what 8 bits lose.
    assert (approximate - dense).abs().mean() > 50 * (found - dense).abs().mean()


def test_other_inputs_get_the_residual_of_the_refresh():
    before = three_tensors()
    # The blocks that are kept are those of the same queries and keys.
    now = (*before[:2], three_tensors()[2])
    residual = attend(before, None, False, sparse=False) - attend(before, None, False)
    kept = keeping("device")
    attend(before, kept, True)
    error = attend(now, kept, False) - attend(now, None, False) - residual
    assert (error.abs() <= residual.abs().amax(-1, keepdim=True) / 127 * 0.501 + 1e-6).all()


def test_a_layer_without_a_residual_refreshes_at_any_step():
    tensors = three_tensors()
    kept = keeping()
    dense = attend(tensors, None, False, sparse=False)
    assert torch.equal(attend(tensors, kept, False), dense)
    assert not torch.equal(attend(tensors, kept, False), dense)


def test_the_last_warm_up_step_is_dense_and_keeps_a_residual():
    tensors, kept = three_tensors(), keeping()
    dense = attend(tensors, None, False, sparse=False)
    assert torch.equal(attend(tensors, kept, True, sparse=False), dense)
    found = attend(tensors, kept, False)
    assert (found - dense).norm() < 0.01 * (attend(tensors, None, False) - dense).norm()


def test_steps_between_use_the_blocks_of_the_refresh():
    kept, now = keeping(), three_tensors()
    attend(three_tensors(), kept, True)
    blocks = kept.blocks("layer")
    attend(now, kept, False)
    assert torch.equal(kept.blocks("layer").to_mask(), blocks.to_mask())
    attend(now, kept, True)
    assert not torch.equal(kept.blocks("layer").to_mask(), blocks.to_mask())


def test_the_last_sparse_step_keeps_nothing():
    kept = keeping()
    attend(three_tensors(), kept, True, last=True)
    assert not kept.residuals._kept


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_8_bits_hold_a_residual(dtype):
    dense, approximate = torch.randn(2, 1, 5, 2, 16).mul(3).to(dtype).unbind()
    approximate[0, 1], dense[0, 2, 0] = dense[0, 1], dense[0, 2, 0] + 1e-4
    kept = Residual.between(dense, approximate)
    assert kept.values.dtype == torch.int8
    assert kept.scales.shape == (1, 5, 2, 1)
    largest = (dense.float() - approximate.float()).abs().amax(-1, keepdim=True)
    error = (kept.added_to(approximate).float() - dense.float()).abs()
    rounding = 2 * torch.finfo(dtype).eps * (largest + dense.float().abs())
    assert (error <= largest / 127 * 0.501 + rounding).all()
    assert torch.equal(kept.added_to(approximate)[0, 1], dense[0, 1])


def test_what_is_not_finite_stays_so():
    dense, approximate = torch.randn(2, 1, 2, 1, 4).unbind()
    dense[0, 0, 0, 1] = torch.nan
    approximate[0, 1, 0, 2] = torch.inf
    found = Residual.between(dense, approximate).added_to(torch.ones_like(dense))
    assert found.isnan().all()


def test_autocast_changes_no_dtype():
    dense, approximate = torch.randn(2, 1, 5, 2, 16).bfloat16().unbind()
    with torch.autocast("cpu", torch.bfloat16):
        kept = Residual.between(dense, approximate)
        assert kept.added_to(approximate).dtype == kept.scales.dtype == torch.bfloat16


# A layer of HunyuanVideo at 720x1280x129 on a GPU: 20.8 GiB of residuals, 12.3 of activations.
LAYER = SimpleNamespace(
    shape=(1, 119_056, 24, 128),
    is_cuda=True,
    device=torch.device("cuda"),
    element_size=lambda: 2,
    nbytes=119_056 * 3072 * 2,
)


@pytest.mark.parametrize(
    ("asked", "device_gib", "host_gib", "expected"),
    [
        ("auto", 34, 0, "device"),
        ("auto", 33, 21, "host"),
        (
            "auto",
            33,
            20,
            "20.8 GiB, but only this much is free: 20.7 on the device and 20.0 on the host",
        ),
        ("device", 21, 0, "device"),
        (
            "device",
            20,
            99,
            "20.8 GiB, but only this much is free: 20.0 on the device; make the video smaller",
        ),
        ("host", 0, 21, "host"),
        (
            "host",
            99,
            20,
            "20.8 GiB, but only this much is free: 20.0 on the host; make the video smaller",
        ),
    ],
)
def test_the_place_is_where_there_is_room(monkeypatch, asked, device_gib, host_gib, expected):
    host = SimpleNamespace(available=host_gib * 2**30)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: host)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: ((device_gib - 3) * 2**30, 0))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 5 * 2**30)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: 2 * 2**30)
    if expected in ("device", "host"):
        assert choose_place(asked, LAYER, 60) == expected
    else:
        with pytest.raises(ResidualMemoryError, match=expected):
            choose_place(asked, LAYER, 60)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_host_memory_gives_what_the_device_gives(dtype, device):
    """Many layers without a wait in between, so that the copies have to keep their order."""
    layers = [torch.randn(2, 2, 3000, 8, 64, device=device).to(dtype) for _ in range(12)]
    places = [PassResiduals(place, len(layers)) for place in ("device", "host")]
    for _ in range(3):
        for residuals in places:
            for number, (dense, approximate) in enumerate(layers):
                residuals.keep(str(number), dense, approximate)
        found = []
        for residuals in places:
            found.append([])
            for number, (_, approximate) in enumerate(layers):
                residuals.fetch(str(number), approximate.device)
                found[-1].append(residuals.add(str(number), approximate))
        for device_out, host_out, (dense, _) in zip(*found, layers, strict=True):
            assert torch.equal(device_out, host_out)
            torch.testing.assert_close(host_out, dense, rtol=0, atol=0.08)


@pytest.mark.gpu
def test_no_layer_waits_for_the_device(device):
    for place in ("device", "host"):
        residuals = PassResiduals(place, 4)
        dense, approximate = torch.randn(2, 1, 512, 4, 64, device=device).unbind()
        for _ in range(2):
            # Pinned memory is made once; later it is reused.
            residuals.keep("layer", dense, approximate)
            residuals.fetch("layer", dense.device)
            residuals.add("layer", approximate)
            torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            residuals.keep("layer", dense, approximate)
            residuals.fetch("layer", dense.device)
            residuals.add("layer", approximate)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_host_residuals_leave_two_buffers_on_the_device(device):
    dense, approximate = torch.randn(2, 1, 4096, 24, 128, device=device).bfloat16().unbind()
    residuals = PassResiduals("host", 20)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    for layer in range(20):
        residuals.keep(str(layer), dense, approximate)
    torch.cuda.synchronize()
    one = dense.nbytes // 2 * 130 // 128
    assert torch.cuda.memory_allocated() - before <= 2.1 * one
