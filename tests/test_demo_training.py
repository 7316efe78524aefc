"""The parts of the demo model's training that must be exact."""

from pathlib import Path

import pytest
import torch

SCRIPTS = Path(__file__).parents[1] / "scripts"


@pytest.fixture(autouse=True)
def _scripts_on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(SCRIPTS))


def test_a_checkpoint_comes_back_from_its_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from demo_training import weights

    monkeypatch.setattr(weights, "PART_BYTES", 1000)
    state = {"weights": [torch.randn(1000)], "step": 3}
    parts = weights.save_checkpoint(tmp_path, "vae", state)
    assert len(parts) > 4
    loaded = weights.load_checkpoint(tmp_path, "vae")
    assert loaded["step"] == 3
    assert torch.equal(loaded["weights"][0], state["weights"][0])


def test_a_missing_checkpoint_is_named(tmp_path: Path) -> None:
    from demo_training.weights import load_checkpoint

    with pytest.raises(
        FileNotFoundError, match=r"no checkpoint of 'vae' in .*, expected vae.ckpt.0"
    ):
        load_checkpoint(tmp_path, "vae")


def test_windows_are_encoded_as_the_stock_tiles_are() -> None:
    from demo_training.clips import encode_windows
    from demo_training.models import build_vae

    torch.manual_seed(0)
    vae = build_vae().eval()
    vae.tile_sample_stride_num_frames = 16
    frames = torch.rand(2, 3, 33, 16, 16)
    with torch.no_grad():
        expected = vae.encode(frames).latent_dist
        mean, log_variance = encode_windows(vae, frames)
    torch.testing.assert_close(mean, expected.mean, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(log_variance, expected.logvar, rtol=1e-4, atol=1e-5)
