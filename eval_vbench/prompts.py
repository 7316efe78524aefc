"""The prompts to generate: VBench's, in three wordings, or the demo model's own."""

import json
from dataclasses import dataclass, field
from typing import Any

from eval_vbench.dimensions import DATA

DEMO_SUITE = "demo"
DEFAULT_SUITE = "gpt_enhanced"
# Suite -> the file of the wordings given to the model; None for the prompts that VBench scores.
_WORDINGS = {
    DEFAULT_SUITE: "all_dimension_longer.txt",
    "hunyuan": "hunyuan_all_dimension.txt",
    "original": None,
}
SUITES = (*_WORDINGS, DEMO_SUITE)

_NUM_DEMO_PROMPTS = 40
# Dimensions that need only the words of a prompt.
_DEMO_DIMENSIONS = (
    "subject_consistency",
    "background_consistency",
    "temporal_flickering",
    "motion_smoothness",
    "dynamic_degree",
    "aesthetic_quality",
    "imaging_quality",
    "overall_consistency",
)
# Seeds of different prompts differ as long as a prompt has at most this many videos.
MAX_VIDEOS_PER_PROMPT = 100
VIDEOS_PER_PROMPT = (1, 5)


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt.

    Attributes:
        index: Its position in the whole suite, even if only a part is generated.
        name: The original prompt, which VBench scores against and which names the files.
        text: The wording given to the model.
        entries: VBench's own entries for it; two prompts are in the lists of two dimensions.
    """

    index: int
    name: str
    text: str
    entries: tuple[dict[str, Any], ...] = field(compare=False)


@dataclass(frozen=True, slots=True)
class VideoItem:
    """One video to generate.

    Attributes:
        prompt: Its prompt.
        video_index: The number of the video among the prompt's videos.
        seed: Its seed, which depends only on both and on the base seed of the run.
    """

    prompt: Prompt
    video_index: int
    seed: int

    @property
    def key(self) -> str:
        """A short, unique key that sorts in the suite's order."""
        return f"{self.prompt.index:04d}-{self.video_index}"

    @property
    def file_name(self) -> str:
        """The file name that VBench expects."""
        return f"{self.prompt.name}-{self.video_index}.mp4"


def load_suite(name: str) -> list[Prompt]:
    """All prompts of a suite.

    Raises:
        ValueError: The suite is unknown.
    """
    if name not in SUITES:
        raise ValueError(f"suite must be one of {', '.join(SUITES)}, got {name!r}.")
    if name == DEMO_SUITE:
        return _demo_suite()
    entries = json.loads((DATA / "VBench_full_info.json").read_text(encoding="utf-8"))
    names = [entry["prompt_en"] for entry in entries]
    wordings = _WORDINGS[name]
    texts = names
    if wordings is not None:
        texts = (DATA / wordings).read_text(encoding="utf-8").splitlines()
    prompts: dict[str, Prompt] = {}
    for prompt, text, entry in zip(names, texts, entries, strict=True):
        if prompt in prompts:
            # Equal names share one video, which has the first wording.
            first = prompts[prompt]
            prompts[prompt] = Prompt(first.index, prompt, first.text, (*first.entries, entry))
        else:
            prompts[prompt] = Prompt(len(prompts), prompt, text, (entry,))
    return list(prompts.values())


def choose_prompts(suite: str, count: int | None) -> list[Prompt]:
    """``count`` prompts of a suite, or all.

    From VBench's list, which is sorted by dimension, prompts are taken at equal distances; from
    the demo model's list, which is in random order, the first ones.

    Raises:
        ValueError: The suite is unknown, or has fewer prompts.
    """
    prompts = load_suite(suite)
    if count is None:
        return prompts
    if not 1 <= count <= len(prompts):
        raise ValueError(
            f"num_prompts must lie between 1 and {len(prompts)} for suite {suite!r}, got {count}."
        )
    if suite == DEMO_SUITE:
        return prompts[:count]
    return [prompts[place * len(prompts) // count] for place in range(count)]


def video_items(prompts: list[Prompt], videos_per_prompt: int, seed: int) -> list[VideoItem]:
    """Every video of a run: the first video of each prompt, then the second, and so on.

    Raises:
        ValueError: VBench does not support this number of videos per prompt.
    """
    if videos_per_prompt not in VIDEOS_PER_PROMPT:
        raise ValueError(
            "videos_per_prompt must be 1 (a reduced run) or 5 (VBench's), "
            f"got {videos_per_prompt}."
        )
    return [
        VideoItem(prompt, index, seed + MAX_VIDEOS_PER_PROMPT * prompt.index + index)
        for index in range(videos_per_prompt)
        for prompt in prompts
    ]


def _demo_suite() -> list[Prompt]:
    from xattn_video.pipelines.demo import held_out_scenes

    names = [scene.prompt for scene in held_out_scenes(_NUM_DEMO_PROMPTS)]
    return [
        Prompt(index, name, name, ({"prompt_en": name, "dimension": list(_DEMO_DIMENSIONS)},))
        for index, name in enumerate(names)
    ]
