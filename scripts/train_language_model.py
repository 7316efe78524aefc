"""Train a small language model that answers in RULER's forms, to measure sparse prefill with.

    python scripts/train_language_model.py --folder runs/language --minutes 7 --workers 14

It makes RULER's forms by itself, needs the package wonderwords for their words, and downloads
nothing. First it learns mostly to copy repeated random strings, then answers in texts that grow
from 256 to 32,768 tokens. `--minutes` is the wall time of the training alone; `--start-from` goes
on with a finished model, from 512 tokens. The folder gets the weights in bfloat16, the
tokenizer, `TRAINING.json` and `evaluation.json`.
"""

import argparse
import copy
import os
import random
import shlex
import sys
import time
from typing import Any

from xattn_video.errors import require_packages
from xattn_video.files import user_path
from xattn_video.reporting.endings import run_script


def main() -> int:
    """Train, save and evaluate."""
    arguments = _parse_arguments()
    require_packages("RULER's texts", "wonderwords")
    import torch
    from transformers import AutoTokenizer, LlamaForCausalLM

    from language_training.evaluation import write_evaluation
    from language_training.sequences import train_tokenizer
    from language_training.training import LONGER, SMOKE, LanguagePlan, Training, make_model
    from language_training.training_record import write_training

    # The processes that make sequences are many already.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    folder = arguments.folder
    folder.mkdir(parents=True, exist_ok=True)
    random.seed(0)
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")
    if arguments.workers:
        # Threads that wait for cores which the workers have make every step slower.
        torch.set_num_threads(1)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    plan = SMOKE if arguments.smoke else LanguagePlan()
    if arguments.start_from is None:
        train_tokenizer(folder, 200 if arguments.smoke else 1000)
        model = make_model(plan)
    else:
        AutoTokenizer.from_pretrained(arguments.start_from).save_pretrained(folder)
        model = LlamaForCausalLM.from_pretrained(arguments.start_from, dtype=torch.float32)
        plan = LONGER
    parameters = sum(one.numel() for one in model.parameters())
    print(f"{parameters / 1e6:.2f} million parameters on {device}", flush=True)

    def save() -> None:
        copy.deepcopy(model).to(torch.bfloat16).save_pretrained(folder)

    seconds = 60 * arguments.minutes
    training = Training(
        plan, folder, seconds, arguments.workers, device, compiled=not arguments.no_compile
    )
    start = time.perf_counter()
    call: dict[str, Any] = {
        "command": shlex.join(sys.argv),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "steps": training.run(model.to(device), save),
        "training_seconds": round(time.perf_counter() - start, 1),
    }
    write_training(folder, arguments.start_from, call)
    start = time.perf_counter()
    write_evaluation(folder, str(device), arguments.lengths, arguments.samples)
    print(f"evaluated in {time.perf_counter() - start:.0f} s", flush=True)
    return 0


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=user_path, required=True)
    parser.add_argument("--minutes", type=float, default=7.0)
    parser.add_argument("--workers", type=int, default=0, help="processes that generate sequences")
    parser.add_argument("--start-from", type=user_path, help="a finished model to continue from")
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument(
        "--smoke", action="store_true", help="a tiny model, for a quick check on a CPU"
    )
    parser.add_argument(
        "--samples", type=int, help="of the evaluation, for each form; 10, or 1 with --smoke"
    )
    parser.add_argument(
        "--lengths",
        type=int,
        nargs="+",
        metavar="TOKENS",
        help="of the evaluation; 1024 8192 16384 32768, or 512 with --smoke",
    )
    arguments = parser.parse_args()
    arguments.samples = arguments.samples or (1 if arguments.smoke else 10)
    arguments.lengths = arguments.lengths or (
        [512] if arguments.smoke else [1024, 8192, 16384, 32768]
    )
    return arguments


if __name__ == "__main__":
    run_script(main)
