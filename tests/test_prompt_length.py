"""Prompts that the text encoders do not read to their end."""

import json

import pytest

from xattn_video.pipelines.loading import LoadOptions, load_pipeline
from xattn_video.pipelines.prompt_length import count_prompt_tokens, cut_prompts
from xattn_video.pipelines.request import GenerationRequest, VideoSettings, shorten_prompt

LONG = "a red circle " * 120


@pytest.fixture(scope="module")
def pipe(tiny_pipeline):
    return load_pipeline(LoadOptions(str(tiny_pipeline), device="cpu"))


def test_counts_are_those_that_the_pipeline_reads(pipe):
    (count,) = count_prompt_tokens(pipe, GenerationRequest("a red circle"))
    _, mask = pipe._get_llama_prompt_embeds("a red circle", _template(), dtype=None)
    assert count.llama == int(mask.sum())
    assert not count.is_cut


def _template():
    from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import DEFAULT_PROMPT_TEMPLATE

    return DEFAULT_PROMPT_TEMPLATE


def test_one_warning_a_prompt_with_both_counts(pipe):
    video = VideoSettings(true_cfg_scale=2.0)
    requests = [
        GenerationRequest(LONG, seed=0, video=video),
        GenerationRequest(LONG, seed=1, video=video),
        GenerationRequest("a red circle", negative_prompt=f"no {LONG}", video=video),
    ]
    count = count_prompt_tokens(pipe, requests[0])[0]
    assert count.llama > 256
    assert count.clip > 77
    first, second = cut_prompts(pipe, requests)
    assert f"Llama reads 256 of {count.llama} tokens, CLIP 77 of {count.clip} tokens; " in first
    assert second.startswith("the prompt 'no a red circle")


def test_an_encoder_that_reads_all_is_said_to(pipe):
    (found,) = cut_prompts(pipe, [GenerationRequest("猫" * 60)])
    count = count_prompt_tokens(pipe, GenerationRequest("猫" * 60))[0]
    assert count.llama <= 256
    assert count.clip > 77
    assert f"the prompt '{'猫' * 37}...' is cut: Llama reads all {count.llama} tokens" in found


@pytest.mark.parametrize(
    ("prompt", "shown"),
    [
        ("a red circle", "a red circle"),
        ("a  red\ncircle", "a red circle"),
        ("a red circle moves right", "a red circle..."),
        ("abcdefghijklmnopqrstuvwxyz", "abcdefghijklm..."),
    ],
)
def test_prompts_are_shortened_between_words(prompt, shown):
    assert shorten_prompt(prompt, 16) == shown


def test_generate_warns_before_the_run_and_keeps_the_counts(generate, tmp_path):
    code, _, err = generate(f"--prompt={LONG}", "--dense", "--output=a.mp4", "--report=run.json")
    assert code == 0, err
    warnings = [line for line in err.splitlines() if line.startswith("warning: the prompt")]
    assert len(warnings) == 1
    assert err.index("is cut: Llama reads 256 of") < err.index("step 2/4")
    (run,) = json.loads((tmp_path / "run.json").read_text())["runs"]
    (count,) = run["prompt_tokens"]
    assert count["llama"] > count["llama_limit"] == 256
    assert count["clip"] > count["clip_limit"] == 77
