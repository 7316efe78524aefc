import os

import torch
from language_models import video_prompt

IMPLEMENTATIONS = []


def get_git_commit_hash():
    os.write(2, b"fatal: not a git repository\n")


def simple_evaluate(lm, tasks, limit, bootstrap_iters):
    config = lm.model.config
    IMPLEMENTATIONS.append(
        (config.text_config._attn_implementation, config.vision_config._attn_implementation)
    )
    with torch.inference_mode():
        lm.model(**video_prompt())
    lm.clean()
    get_git_commit_hash()
    samples = [
        {"doc_id": number, "videomme_perception_score": {"score": number % 2}}
        for number in range(limit)
    ]
    return {"samples": {tasks[0]: samples}}
