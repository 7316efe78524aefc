"""The parts of the demo model's training that must be exact."""

import functools
import itertools
import json
import time
from pathlib import Path

import pytest
import torch
from full_disk import KINDS, no_room, small_disk
from safetensors.torch import load_file

from xattn_video.errors import FileNotWrittenError
from xattn_video.pipelines.demo import DEMO_DIR
from xattn_video.pipelines.demo.grammar import parse_prompt

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


@pytest.mark.parametrize("kind", KINDS)
def test_a_state_without_room_names_its_file_and_leaves_the_old_one(
    kind: str, tmp_path: Path
) -> None:
    from demo_training import weights

    with small_disk(kind, tmp_path / "disk") as folder:
        file = folder / "vae.pt"
        weights.save_state(file, torch.zeros(3))
        with no_room(kind, folder), pytest.raises(FileNotWrittenError, match=r"vae\.pt"):
            weights.save_state(file, torch.zeros(100_000))
        assert len(torch.load(file)) == 3


def test_chosen_matrices_take_steps_of_equal_size_in_every_direction() -> None:
    from demo_training.weights import TrainedWeights

    torch.manual_seed(0)
    modules = [torch.nn.Linear(16, 16), torch.nn.Linear(16, 16)]
    before = [module.weight.detach().clone() for module in modules]
    trained = TrainedWeights(
        modules,
        dtype=torch.float32,
        stored_dtype=torch.float32,
        betas=(0.9, 0.99),
        weight_decay=0.0,
        ema_decay=0.9,
        matrices=[modules[1].weight],
    )
    modules[1](modules[0](torch.randn(64, 16))).square().sum().backward()
    trained.step(1e-2, warmup_steps=1)
    by_adamw, by_muon = (
        module.weight.detach() - weight for module, weight in zip(modules, before, strict=True)
    )
    # AdamW's first step has one size for every element, Muon's nearly one for the directions.
    torch.testing.assert_close(by_adamw.abs(), torch.full((16, 16), 1e-2), rtol=0.01, atol=0)
    sizes, sizes_of_adamw = torch.linalg.svdvals(by_muon), torch.linalg.svdvals(by_adamw)
    assert sizes.max() < 2 * sizes.median()
    assert sizes_of_adamw.max() > 3 * sizes_of_adamw.median()


def test_a_missing_checkpoint_is_named(tmp_path: Path) -> None:
    from demo_training.weights import load_checkpoint

    with pytest.raises(
        FileNotFoundError, match=r"no checkpoint of 'vae' in .*, expected vae.ckpt.0"
    ):
        load_checkpoint(tmp_path, "vae")


def test_a_refined_model_s_calls_follow_those_before(tmp_path: Path) -> None:
    from demo_training import weights

    finished = tmp_path / "model"
    finished.mkdir()
    (finished / "TRAINING.json").write_text('{"calls": [{"stage": "vae"}]}')
    weights.inherit_reports(tmp_path, finished)
    weights.add_report(tmp_path, {"stage": "transformer"})
    weights.inherit_reports(tmp_path, finished)
    calls = json.loads((tmp_path / "training.json").read_text())
    assert [call["stage"] for call in calls] == ["vae", "transformer"]


def test_the_decoder_stage_leaves_the_encoder_what_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from demo_training import vae_stage
    from demo_training.training_plan import SMOKE, Clock, TrainingJob

    monkeypatch.setattr(vae_stage, "measure_reconstruction", lambda job, vae: {})
    job = TrainingJob(
        stage="decoder",
        work_dir=tmp_path,
        started=time.time(),
        seconds=0.0,
        total_seconds=None,
        resume=False,
        start_from=DEMO_DIR,
        seed=0,
        device=torch.device("cpu"),
        plan=SMOKE,
    )
    steps = iter([False, True])
    monkeypatch.setattr(Clock, "is_over", property(lambda clock: next(steps)))
    vae_stage.run(job)
    trained = torch.load(tmp_path / vae_stage.VAE_FILE, weights_only=True)
    before = load_file(DEMO_DIR / "vae" / "diffusion_pytorch_model.safetensors")
    changed = {name.split(".")[0] for name in before if (before[name] != trained[name]).any()}
    assert changed <= {"decoder", "post_quant_conv"}
    assert "decoder" in changed


def test_windows_are_encoded_as_the_stock_tiles_are() -> None:
    from demo_training.models import build_vae
    from demo_training.rendered_clips import encode_windows

    torch.manual_seed(0)
    vae = build_vae().eval()
    vae.tile_sample_stride_num_frames = 16
    frames = torch.rand(2, 3, 33, 16, 16)
    with torch.no_grad():
        expected = vae.encode(frames).latent_dist
        mean, log_variance = encode_windows(vae, frames)
    torch.testing.assert_close(mean, expected.mean, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(log_variance, expected.logvar, rtol=1e-4, atol=1e-5)


def test_an_object_s_words_stand_where_the_text_stage_reads_them() -> None:
    from demo_training import text_stage
    from demo_training.models import TEMPLATE_TOKENS, build_text_stack

    prompt = (
        "a red circle moving left to right and a green ring growing small to large "
        "on a gray background"
    )
    scene = parse_prompt(prompt)
    text = build_text_stack()
    ids, _ = text.tokenize([prompt], torch.device("cpu"))
    words = [text.tokenizer.decode(token).strip() for token in ids[0, TEMPLATE_TOKENS:]]
    assert words[1:8] == ["a", "red", "circle", "moving", "left", "to", "right"]
    assert words[9:16] == ["a", "green", "ring", "growing", "small", "to", "large"]

    rows = text_stage._object_targets(scene)
    hidden = text_stage.IGNORED
    assert len(rows) == 14
    assert rows[1] == [0, 0, hidden, hidden], "a colour's word tells place and colour"
    assert rows[13] == [1, 1, 3, 4], "the last word tells all of its object"


def test_the_text_encoders_learn_the_order_of_words() -> None:
    from demo_training import text_stage
    from demo_training.models import build_text_stack

    torch.manual_seed(0)
    text = build_text_stack()
    heads = text_stage.Heads(128, 64)
    device = torch.device("cpu")
    scene = parse_prompt("a red circle moving left to right over a blue background")
    mirrored = parse_prompt("a red circle moving right to left over a blue background")
    parameters = [*heads.parameters(), *text.text_encoder.parameters()]
    optimiser = torch.optim.Adam(parameters, lr=1e-3)
    for _ in range(30):
        text_stage._loss(text, heads, [scene, mirrored], device).backward()
        optimiser.step()
        optimiser.zero_grad()
    _, logits, targets, choices = text_stage._readings(text, heads, [scene, mirrored], device)[0]
    motion = logits.split(choices, -1)[3][:, 6].argmax(-1)
    assert torch.equal(motion, targets[:, 6, 3])
    assert motion[0] != motion[1]


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last_3d])
def test_training_layers_compute_what_the_stock_ones_do(
    memory_format: torch.memory_format, monkeypatch: pytest.MonkeyPatch
) -> None:
    from demo_training import vae_stage
    from demo_training.models import build_vae
    from demo_training.vae_layers import use_training_layers

    # Drawn in the order of the memory, which differs.
    noise = torch.randn(2, 8, 9, 2, 2)
    monkeypatch.setattr(torch, "randn_like", lambda like: noise)
    frames = torch.rand(2, 3, 33, 16, 16)
    results = []
    for own in (False, True):
        torch.manual_seed(0)
        vae = build_vae().train()
        if own:
            use_training_layers(vae.to(memory_format=memory_format))
        loss, _ = vae_stage._loss(vae, frames, first_latent=2, by_psnr=False)
        loss.backward()
        results.append([loss, *(parameter.grad for parameter in vae.parameters())])
    for actual, expected in zip(*reversed(results), strict=True):
        assert (actual - expected).norm() <= 1e-4 * expected.norm() + 1e-7


def test_each_step_has_its_own_loss_gradients_and_noise(device: torch.device) -> None:
    from demo_training.graphs import StepGraphs

    layer = torch.nn.Linear(3, 2).to(device)
    graphs = StepGraphs(layer.parameters())

    def compute(x: torch.Tensor, *, power: int) -> tuple[torch.Tensor, ...]:
        return layer(x).pow(power).sum(), torch.rand_like(x)

    noises = []
    # Each kind once as it is, once recorded, and then replayed.
    for power in (1, 2, 1, 2, 1, 2, 2, 1):
        x = torch.randn(4, 3, device=device)
        loss, noise = graphs.run(power, functools.partial(compute, power=power), x)
        expected = layer(x).pow(power).sum()
        torch.testing.assert_close(loss, expected.detach())
        expected_gradients = torch.autograd.grad(expected, list(layer.parameters()))
        for parameter, gradient in zip(layer.parameters(), expected_gradients, strict=True):
            torch.testing.assert_close(parameter.grad, gradient)
            parameter.grad = None
        noises.append(noise)
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(noises, 2))
