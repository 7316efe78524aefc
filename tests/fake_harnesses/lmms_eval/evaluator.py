import torch
from language_models import video_prompt

IMPLEMENTATIONS = []


def simple_evaluate(lm, tasks, limit, bootstrap_iters):
    config = lm.model.config
    IMPLEMENTATIONS.append(
        (config.text_config._attn_implementation, config.vision_config._attn_implementation)
    )
    with torch.inference_mode():
        lm.model(**video_prompt())
    lm.clean()
    samples = [
        {"doc_id": number, "videomme_perception_score": {"score": number % 2}}
        for number in range(limit)
    ]
    return {"samples": {tasks[0]: samples}}
