"""How many answers the trained model gets right, dense and sparse, without any harness."""

import random
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaForCausalLM

from language_training.forms import FORMS
from language_training.sequences import Encoded, Encoder
from language_training.training_record import weights_digest
from xattn_video import enable_xattention
from xattn_video.files import write_json
from xattn_video.reporting.machine import machine_record

EVALUATION = "evaluation.json"


def write_evaluation(folder: Path, device: str, lengths: list[int], samples: int) -> None:
    """Evaluate the model of a folder in bfloat16, and write the shares beside it."""
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).to(device).eval()
    shares = evaluate(model, folder, lengths, samples)
    record = {
        "weights_sha256": weights_digest(folder),
        "dtype": "bfloat16",
        "samples": samples,
        **machine_record(model.device, "transformers"),
        "shares": shares,
    }
    write_json(folder / EVALUATION, record)


@torch.inference_mode()
def evaluate(
    model: LlamaForCausalLM, folder: Path, lengths: list[int], samples: int
) -> dict[str, Any]:
    """The share of first answers whose likeliest tokens are right, by setting, length and form."""
    encoder = Encoder(folder)
    result: dict[str, Any] = {"dense": {}, "0.9": {}}
    for length in lengths:
        random.seed(length)
        prompts = {
            form.__name__: [_prompt(encoder, form, length) for _ in range(samples)]
            for form, (_, least) in FORMS.items()
            if length >= least
        }
        for setting, by_length in result.items():
            table = {name: _share(model, some, setting) for name, some in prompts.items()}
            by_length[str(length)] = table
            print(setting, length, table, flush=True)
    return result


def _prompt(encoder: Encoder, form: Any, length: int) -> Encoded:
    """A prompt with its first answer."""
    while True:
        pieces = form(length)
        first = next(index for index, piece in enumerate(pieces) if piece.is_answer)
        text = encoder.encode(pieces[: first + 1])
        if len(text.ids) <= length:
            return text


def _share(model: LlamaForCausalLM, prompts: list[Encoded], setting: str) -> dict[str, float]:
    right, density = 0, 1.0
    handle = None
    if setting != "dense":
        handle = enable_xattention(model, threshold=float(setting), min_tokens=0)
    for text in prompts:
        tokens = torch.tensor([text.ids], device=model.device)
        count = sum(text.answers)
        logits = model(tokens, use_cache=False, logits_to_keep=count + 1).logits[0, :-1]
        places = range(len(text.ids) - count, len(text.ids))
        right += all(
            one == text.ids[place] or one in text.others.get(place, [])
            for place, one in zip(places, logits.argmax(-1).tolist(), strict=True)
        )
    if handle is not None:
        density = handle.report().density
        handle.disable()
    return {"right": right / len(prompts), "density": density}
