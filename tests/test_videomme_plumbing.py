"""Video-MME from end to end: the real harness, a made clip, and a tiny Qwen2-VL of random weights.

The scores mean nothing. It needs lmms-eval with torchvision, decord and qwen-vl-utils, which
belong in an environment of their own (docs/long_context.md).
"""

import json
from pathlib import Path

import pytest
import torch
from harness_scripts import run_script

for package in ("torchvision", "lmms_eval", "decord", "qwen_vl_utils"):
    pytest.importorskip(package, reason="of the harness of Video-MME")

_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{% if message.content is string "
    "%}{{ message.content }}{% else %}{% for part in message.content %}{% if part.type == 'video' "
    "%}<|vision_start|><|video_pad|><|vision_end|>{% elif part.type == 'text' %}{{ part.text }}"
    "{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}"
    "<|im_start|>assistant\n{% endif %}"
)
_SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)


def make_model(folder: Path) -> None:
    """Save a Qwen2-VL of two layers with random weights, its tokenizer and its processor."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import (
        PreTrainedTokenizerFast,
        Qwen2VLConfig,
        Qwen2VLForConditionalGeneration,
        Qwen2VLImageProcessor,
        Qwen2VLProcessor,
        Qwen2VLVideoProcessor,
    )

    signs = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={sign: n for n, sign in enumerate(signs)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    words = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        additional_special_tokens=list(_SPECIAL),
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=_TEMPLATE,
    )
    number = {word: words.convert_tokens_to_ids(word) for word in _SPECIAL}
    config = Qwen2VLConfig(
        text_config={
            "vocab_size": len(words),
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 8192,
            "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3]},
            "bos_token_id": number["<|im_start|>"],
            "eos_token_id": number["<|im_end|>"],
        },
        vision_config={"depth": 1, "embed_dim": 32, "hidden_size": 64, "num_heads": 2},
        image_token_id=number["<|image_pad|>"],
        video_token_id=number["<|video_pad|>"],
        vision_start_token_id=number["<|vision_start|>"],
        vision_end_token_id=number["<|vision_end|>"],
    )
    torch.manual_seed(0)
    Qwen2VLForConditionalGeneration(config).save_pretrained(folder)
    Qwen2VLProcessor(
        Qwen2VLImageProcessor(), words, Qwen2VLVideoProcessor(), chat_template=_TEMPLATE
    ).save_pretrained(folder)


def make_data(home: Path, work: Path) -> None:
    """Write a clip where the harness looks for videos, and a question about it as the data set."""
    import imageio.v3 as imageio
    import numpy as np

    videos = home / "videomme" / "data"
    videos.mkdir(parents=True)
    frames = np.random.default_rng(0).integers(0, 255, (64, 224, 224, 3), np.uint8)
    imageio.imwrite(videos / "clip.mp4", frames, fps=4, macro_block_size=16)
    question = {
        "videoID": "clip",
        "question_id": "001-1",
        "duration": "short",
        "domain": "Knowledge",
        "sub_category": "Astronomy",
        "task_type": "Counting Problem",
        "question": "What does the clip show?",
        "options": ["A. Noise.", "B. A cat.", "C. A car.", "D. Rain."],
        "answer": "A",
    }
    data = work / "lmms-eval" / "Video-MME"
    data.mkdir(parents=True)
    (data / "test.jsonl").write_text(json.dumps(question) + "\n")


@pytest.mark.slow
def test_the_script_runs_to_its_table(tmp_path):
    make_model(tmp_path / "model")
    make_data(tmp_path / "home", tmp_path)
    words = ["--model=model", "--dtype=float32", "--frames=64", "--samples=1", "--tasks=videomme"]
    messages, report = run_script("run_vllms.sh", tmp_path, *words, "--dense-layers=1")
    assert "  videomme, dense: 1 of 1 samples" in messages
    assert "Model Responding" not in messages
    dense, sparse = report["results"]
    assert dense["density"] is None
    assert 0 < sparse["density"] < 1
    assert "videomme" in (tmp_path / "run/report.md").read_text()
