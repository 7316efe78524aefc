import logging
import os
import sys

import torch

CALLS = []
NOISE = []
"""Warnings for each sample."""


def get_git_commit_hash():
    """Prints as a process of its own does, which asks outside of a repository."""
    os.write(2, b"fatal: not a git repository\n")


def simple_evaluate(lm, tasks, limit, bootstrap_iters, task_manager):
    (task,) = tasks
    CALLS.append((task, lm.model.config._attn_implementation))
    print("a table of the harness")
    samples = []
    for number in range(limit):
        print("\rRunning generate_until requests", file=sys.stderr)
        for text in NOISE:
            logging.getLogger("lm_eval.models").warning(text, number)
        torch.manual_seed(number)
        prompt = torch.randint(3, lm.model.config.vocab_size, (1, 400))
        with torch.inference_mode():
            best = int(lm._model_generate(prompt))
        # A score for the length of the prompt, -1 for the others.
        scores = {"4096": -1, "1024": best % 2, "1100": best % 2}
        samples.append({"doc_id": number, "metrics": list(scores), **scores})
    get_git_commit_hash()
    return {"samples": {task: samples}}
