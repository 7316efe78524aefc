"""Times decoding with a model's own attention and with xattention, alternately.

    python -m benchmarks.decode --model random:llama-3-8b --tokens 4096 --output decode.json

Decoding runs dense with both, so the difference is the time that xattention takes to decide that.
"""

import argparse
import inspect
import statistics
import time
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from benchmarks.results_writer import ResultsWriter, environment
from benchmarks.script_options import measuring_parser
from xattn_video.language.model_sources import find_language_model
from xattn_video.language.registration import enable_prefill
from xattn_video.measure.timing import wait_for
from xattn_video.reporting.endings import run_script

ATTENTIONS = ("sdpa", "xattention")
_WARM_UP_ROUNDS = 2


def main(words: list[str] | None = None) -> None:
    arguments = make_parser().parse_args(words)
    device = torch.device(arguments.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    rounds = arguments.rounds + _WARM_UP_ROUNDS
    context = arguments.tokens + len(ATTENTIONS) * arguments.steps * rounds
    results = ResultsWriter(arguments.output, environment(device, arguments.commit))
    for name in arguments.model:
        model = find_language_model(name, context).load(dtype, device)
        seconds = time_rounds(model, arguments.tokens, arguments.rounds, arguments.steps)
        row = {
            "name": "decode",
            "model": name,
            "tokens": arguments.tokens,
            "rounds": arguments.rounds,
            "steps": arguments.steps,
            "dtype": str(dtype).removeprefix("torch."),
            **summarise(seconds, arguments.steps),
        }
        results.add(row, True)
        print(row)


def make_parser() -> argparse.ArgumentParser:
    parser = measuring_parser(__doc__)
    add = parser.add_argument
    models = "as in `xattn-video prefill`; can be repeated"
    add("--model", action="append", required=True, help=models)
    add("--tokens", type=int, default=4096, help="of the prompt")
    add("--rounds", type=int, default=40, help="rounds of each attention, alternating")
    add("--steps", type=int, default=8, help="tokens decoded in a round")
    return parser


@torch.inference_mode()
def time_rounds(
    model: PreTrainedModel, num_tokens: int, rounds: int, steps: int
) -> dict[str, list[float]]:
    """{attention: seconds of its rounds}; the attention that goes first alternates."""
    device, vocabulary = model.device, model.config.vocab_size
    generator = torch.Generator(device).manual_seed(0)
    prompt = torch.randint(vocabulary, (1, num_tokens), generator=generator, device=device)
    names = inspect.signature(model.forward).parameters
    options: dict[str, Any] = {
        # The argument is past_key_values before transformers 5.23 and cache from then on.
        "cache" if "cache" in names else "past_key_values": DynamicCache(config=model.config),
        "logits_to_keep": 1,
    }
    token = _next_token(model, prompt, options)
    seconds: dict[str, list[float]] = {name: [] for name in ATTENTIONS}
    for number in range(rounds + _WARM_UP_ROUNDS):
        for name in ATTENTIONS[:: -1 if number % 2 else 1]:
            with nullcontext() if name == "sdpa" else enable_prefill(model, None):
                wait_for(device)
                start = time.perf_counter()
                for _ in range(steps):
                    token = _next_token(model, token, options)
                wait_for(device)
                seconds[name].append(time.perf_counter() - start)
    return {name: times[_WARM_UP_ROUNDS:] for name, times in seconds.items()}


def summarise(seconds: dict[str, list[float]], steps: int) -> dict[str, float]:
    """Milliseconds per token, and the median ratio of xattention's rounds to their neighbours."""
    own, ours = (seconds[name] for name in ATTENTIONS)
    per_token = 1e3 / steps
    return {
        "sdpa_ms": statistics.median(own) * per_token,
        "xattention_ms": statistics.median(ours) * per_token,
        "ratio": statistics.median(b / a for a, b in zip(own, ours, strict=True)),
    }


def _next_token(model: PreTrainedModel, tokens: Tensor, options: dict[str, Any]) -> Tensor:
    """The most likely next token, int64 `[1, 1]`, on the device."""
    return model(tokens, **options).logits[:, -1:].argmax(dim=-1)


if __name__ == "__main__":
    run_script(main)
