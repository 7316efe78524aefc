"""Counts the tokens of prompts, and warns if a text encoder cuts a prompt."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from xattn_video.pipelines.request import GenerationRequest, shorten_prompt

if TYPE_CHECKING:
    from diffusers import HunyuanVideoPipeline

# The pipeline's default limits on Llama's and CLIP's tokens.
LLAMA_LIMIT = 256
CLIP_LIMIT = 77


@dataclass(frozen=True, slots=True)
class PromptTokens:
    """The number of tokens of one prompt, including the end tokens.

    Attributes:
        text: The prompt.
        llama, clip: The counts of the two text encoders.
    """

    text: str
    llama: int
    clip: int
    llama_limit: int = LLAMA_LIMIT
    clip_limit: int = CLIP_LIMIT

    @property
    def is_cut(self) -> bool:
        """Whether a text encoder cuts the prompt."""
        return self.llama > self.llama_limit or self.clip > self.clip_limit


def count_prompt_tokens(
    pipe: "HunyuanVideoPipeline", request: GenerationRequest
) -> tuple[PromptTokens, ...]:
    """Count the tokens of a request's prompt, and of its negative prompt if it has one."""
    from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import DEFAULT_PROMPT_TEMPLATE

    counts = []
    for text in filter(None, (request.prompt, request.negative_prompt)):
        whole = pipe.tokenizer(DEFAULT_PROMPT_TEMPLATE["template"].format(text)).input_ids
        llama = len(whole) - DEFAULT_PROMPT_TEMPLATE["crop_start"]
        counts.append(PromptTokens(text, llama, len(pipe.tokenizer_2(text).input_ids)))
    return tuple(counts)


def cut_prompts(pipe: "HunyuanVideoPipeline", requests: Iterable[GenerationRequest]) -> list[str]:
    """One warning for each prompt that a text encoder cuts."""
    counts = (count for request in requests for count in count_prompt_tokens(pipe, request))
    return [
        f"the prompt {shorten_prompt(count.text, 40)!r} is cut: Llama reads "
        f"{_share(count.llama, count.llama_limit)}, CLIP {_share(count.clip, count.clip_limit)}; "
        "put the most important part first."
        for count in dict.fromkeys(counts)
        if count.is_cut
    ]


def _share(count: int, limit: int) -> str:
    return f"{limit} of {count} tokens" if count > limit else f"all {count} tokens"
