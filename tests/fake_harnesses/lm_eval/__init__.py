"""Stands for lm-evaluation-harness: the same calls, on prompts of random tokens."""

import torch

CALLS = []


def simple_evaluate(lm, tasks, limit, bootstrap_iters, task_manager):
    (task,) = tasks
    CALLS.append((task, lm.model.config._attn_implementation))
    samples = []
    for number in range(limit):
        torch.manual_seed(number)
        prompt = torch.randint(3, lm.model.config.vocab_size, (1, 400))
        with torch.inference_mode():
            best = int(lm.model(prompt, logits_to_keep=1).logits.argmax())
        # A score for the length of the prompt, -1 for the others.
        scores = {"4096": -1, "300": best % 2, "400": best % 2}
        samples.append({"doc_id": number, "metrics": list(scores), **scores})
    return {"samples": {task: samples}}
