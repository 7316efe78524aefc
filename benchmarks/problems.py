"""Named attention problems, and groups of them."""

from xattn_video.measure.attention_problems import AttentionProblem

_TEXT_TOKENS = 256
_SWEEP = (2, 4, 8, 16, 32, 64, 128, 256)
_LLAMA_8B = {"heads": 32, "head_dim": 128, "key_heads": 8, "causal": True}

PROBLEMS = {
    problem.name: problem
    for problem in (
        AttentionProblem("hunyuan-720p-129f", 33 * 45 * 80 + _TEXT_TOKENS, 24, 128),
        AttentionProblem("hunyuan-544p-129f", 33 * 34 * 60 + _TEXT_TOKENS, 24, 128),
        AttentionProblem("hunyuan-720p-33f", 9 * 45 * 80 + _TEXT_TOKENS, 24, 128),
        AttentionProblem("demo-512p-65f", 17 * 32 * 32 + _TEXT_TOKENS, 2, 128),
        *(AttentionProblem(f"{size}k", size * 1024, 24, 128) for size in _SWEEP),
        *(AttentionProblem(f"cpu-{size}k", size * 1024, 4, 64) for size in _SWEEP[:4]),
        *(AttentionProblem(f"llama-8b-{k}k", k * 1024, **_LLAMA_8B) for k in _SWEEP[1:]),
    )
}

GROUPS = {
    "sweep": [f"{size}k" for size in _SWEEP if size >= 8],
    "small-sweep": [f"{size}k" for size in _SWEEP if size <= 32],
    "cpu-sweep": [f"cpu-{size}k" for size in _SWEEP[:4]],
    "llama-8b": [f"llama-8b-{size}k" for size in _SWEEP if size >= 8],
}
"""{name of a group: names of its problems}."""


def find_problems(names: list[str]) -> list[AttentionProblem]:
    """The problems with these names; a group stands for all its problems.

    Raises:
        ValueError: No problem or group has that name.
    """
    single = [part for name in names for part in GROUPS.get(name, [name])]
    unknown = [name for name in single if name not in PROBLEMS]
    if unknown:
        known = ", ".join([*PROBLEMS, *GROUPS])
        raise ValueError(f"unknown problem {unknown[0]!r}; expected some of {known}.")
    return [PROBLEMS[name] for name in single]
