"""A model folder is checked before it is loaded: one line with the file and the remedy."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from command_line import SMALL, run_cli
from hunyuan import TINY_PIPELINE

from xattn_video.pipelines.demo import DEMO_DIR
from xattn_video.pipelines.model_files import check_model_files

TRANSFORMER = "transformer/diffusion_pytorch_model.safetensors"
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"


@pytest.fixture
def model(tiny_pipeline, tmp_path) -> Path:
    """A copy that may be damaged."""
    return shutil.copytree(tiny_pipeline, tmp_path / "model")


def cut(file: Path, size: int) -> None:
    file.write_bytes(file.read_bytes()[:size])


def change(file: Path, **values: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def shard(folder: Path, weight_map: dict[str, str]) -> None:
    """Make one shard of the weights, and an index."""
    (folder / "diffusion_pytorch_model.safetensors").rename(folder / "one.safetensors")
    index = folder / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))


DAMAGES = {
    "weights cut short": (
        lambda m: cut(m / TRANSFORMER, 20_000),
        f"{TRANSFORMER} is damaged or truncated at 20,000 bytes (",
    ),
    "header cut short": (
        lambda m: cut(m / TRANSFORMER, 100),
        f"{TRANSFORMER} is damaged or truncated at 100 bytes (invalid header length)",
    ),
    "weights too long": (
        lambda m: (m / TRANSFORMER).open("ab").write(b"more"),
        f"{TRANSFORMER} is damaged",
    ),
    "a web page": (
        lambda m: (m / TRANSFORMER).write_text("<html>Not found</html>" * 9),
        f"{TRANSFORMER} is damaged",
    ),
    "empty weights": (
        lambda m: (m / TRANSFORMER).write_bytes(b""),
        f"{TRANSFORMER} is empty; download it again.",
    ),
    "an LFS pointer": (
        lambda m: (m / TRANSFORMER).write_bytes(LFS),
        f"{TRANSFORMER} is a git-LFS pointer, not the file itself; run `git lfs pull`",
    ),
    "an LFS pointer as tokenizer": (
        lambda m: (m / "tokenizer/tokenizer.json").write_bytes(LFS),
        "tokenizer/tokenizer.json is a git-LFS pointer",
    ),
    "no weights": (
        lambda m: (m / "text_encoder/model.safetensors").rename(
            m / "text_encoder/model.fp16.safetensors"
        ),
        "text_encoder has no weights, model.safetensors or pytorch_model.bin: "
        "found config.json, model.fp16.safetensors; download it again.",
    ),
    "truncated pickled weights": (
        lambda m: (
            (m / "text_encoder/model.safetensors").unlink(),
            (m / "text_encoder/pytorch_model.bin").write_bytes(b"PK"),
        ),
        "text_encoder/pytorch_model.bin is damaged or truncated at 2 bytes",
    ),
    "empty pickled weights": (
        lambda m: (
            (m / "text_encoder/model.safetensors").unlink(),
            (m / "text_encoder/pytorch_model.bin").write_bytes(b""),
        ),
        "text_encoder/pytorch_model.bin is empty",
    ),
    "a missing shard": (
        lambda m: shard(m / "vae", {"a": "one.safetensors", "b": "two.safetensors"}),
        # The first shard lacks "a", which is found first.
        "vae/one.safetensors lacks 1 of the tensors that its index names, such as 'a'",
    ),
    "a missing shard alone": (
        lambda m: shard(m / "vae", {"b": "two.safetensors"}),
        "vae/two.safetensors is missing from the model; download it again.",
    ),
    "an index without a map": (
        lambda m: shard(m / "vae", {}),
        "index.json has no weight_map from tensors to files",
    ),
    "an empty config": (
        lambda m: (m / "vae/config.json").write_bytes(b""),
        "vae/config.json is empty",
    ),
    "no JSON": (
        lambda m: (m / "transformer/config.json").write_text("{,"),
        "transformer/config.json is not valid JSON (",
    ),
    "no UTF-8": (
        lambda m: (m / "transformer/config.json").write_bytes(b"{\xff"),
        "transformer/config.json is not valid JSON (",
    ),
    "a JSON list": (
        lambda m: (m / "text_encoder_2/config.json").write_text("[1]"),
        "text_encoder_2/config.json must hold a JSON object, got list",
    ),
    "no config": (
        lambda m: (m / "scheduler/scheduler_config.json").unlink(),
        "scheduler/scheduler_config.json is missing from the model",
    ),
    "no part": (lambda m: shutil.rmtree(m / "vae"), "vae/config.json is missing"),
    "no tokenizer": (
        lambda m: shutil.rmtree(m / "tokenizer_2"),
        "tokenizer_2/tokenizer_config.json is missing",
    ),
    "no vocabulary": (
        lambda m: (m / "tokenizer/tokenizer.json").unlink(),
        "tokenizer lacks a vocabulary, tokenizer.json or tokenizer.model or vocab.json",
    ),
    "half a vocabulary": (
        lambda m: (m / "tokenizer_2/tokenizer.json").rename(m / "tokenizer_2/vocab.json"),
        "tokenizer_2/merges.txt is missing",
    ),
    "part not named": (
        lambda m: change(m / "model_index.json", text_encoder=[None, None]),
        "model_index.json names no text_encoder, got [None, None]",
    ),
    "another transformer": (
        lambda m: change(m / "transformer/config.json", _class_name="WanTransformer3DModel"),
        "transformer/config.json belongs to another model: _class_name "
        "is 'WanTransformer3DModel', "
        "expected 'HunyuanVideoTransformer3DModel'",
    ),
    "another text encoder": (
        lambda m: change(m / "text_encoder/config.json", model_type="t5"),
        "text_encoder/config.json belongs to another model: model_type is 't5', expected 'llama'",
    ),
    "a VAE of another model": (
        lambda m: change(m / "vae/config.json", latent_channels=16),
        "to different models: in_channels is 4 and latent_channels is 16, expected the same",
    ),
    "more layers than weights": (
        lambda m: change(m / "transformer/config.json", num_layers=2),
        "do not fit its config.json: transformer_blocks.1.",
    ),
    "layers of another size": (
        lambda m: change(m / "transformer/config.json", mlp_ratio=4.0),
        "do not fit its config.json: ",
    ),
}


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_folders_are_refused_in_one_line(damage, model, tmp_path):
    harm, message = DAMAGES[damage]
    harm(model)
    code, _, err = run_cli(
        "generate", "--prompt=a", "--model", model, *SMALL, f"--output={tmp_path / 'a.mp4'}"
    )
    assert code == 2, err
    assert err.startswith("error: ")
    assert message in err
    assert err.count("\n") == 1
    assert str(model) in err


@pytest.mark.parametrize("damage", ["header cut short", "empty weights", "no JSON"])
def test_loading_and_planning_refuse_too(damage, model):
    from xattn_video.pipelines.loading import LoadOptions, load_pipeline

    harm, message = DAMAGES[damage]
    harm(model)
    with pytest.raises(ValueError, match="model") as refused:
        load_pipeline(LoadOptions(str(model), device="cpu"))
    assert message in str(refused.value)
    (model / "vae/diffusion_pytorch_model.safetensors").write_bytes(b"")
    code, _, err = run_cli("plan", "--model", model)
    assert code == 2
    assert err.count("\n") == 1


def test_whole_folders_pass(model):
    assert TINY_PIPELINE.transformer["num_layers"] == 1
    check_model_files(model)
    check_model_files(DEMO_DIR)


def test_pickled_and_quantised_weights_are_left_to_diffusers(model):
    change(model / "transformer/config.json", quantization_config={"quant_method": "torchao"})
    change(model / "transformer/config.json", num_layers=2)
    (model / "vae/diffusion_pytorch_model.safetensors").unlink()
    torch.save({}, model / "vae/diffusion_pytorch_model.bin")
    check_model_files(model)


@pytest.mark.parametrize("name", ["", "folder/file.txt"])
def test_neither_nothing_nor_a_file_is_a_model(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/file.txt").touch()
    code, _, err = run_cli("plan", "--model", name)
    assert code == 2
    assert err.startswith(f"error: model {name!r} is neither a folder nor a hub ID; expected")
