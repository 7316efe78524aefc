"""Check how many of RULER's forms a small language model answers, dense and sparse.

    python scripts/check_language_model.py --folder xattn_video/language/demo

It generates the prompts, needs the package wonderwords for their words, and downloads nothing. An
answer is right if each of its tokens is the most likely one; values of one key may come in any
order. The shares and the SHA-256 of the weights are written to `evaluation.json` in the folder.
"""

import argparse

from xattn_video.errors import require_packages
from xattn_video.files import user_path
from xattn_video.reporting.endings import run_script


def main() -> int:
    """Evaluate and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=user_path, required=True)
    parser.add_argument("--device", help="default: CUDA if there is one, else the CPU")
    parser.add_argument("--samples", type=int, default=20, help="for each form and length")
    parser.add_argument(
        "--lengths", type=int, nargs="+", default=[1024, 8192, 16384, 32768], metavar="TOKENS"
    )
    arguments = parser.parse_args()
    require_packages("RULER's texts", "wonderwords")
    import torch

    from language_training.evaluation import write_evaluation

    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    write_evaluation(arguments.folder, device, arguments.lengths, arguments.samples)
    return 0


if __name__ == "__main__":
    run_script(main)
