"""From how many video tokens on sparse attention has been measured to pay."""

_ON_CUDA = 16384
_ELSEWHERE = 2048


def resolve_min_tokens(min_tokens: int | None, device_type: str) -> int:
    """What is asked for, or the default of a device where nothing is.

    With half of the blocks kept XAttention beats the best dense kernel from there on: on CUDA by
    flash4 and triton, as measured on an H100; elsewhere as on a CPU, whose shortest measured
    length this is. docs/benchmarks.md has the curves.
    """
    if min_tokens is not None:
        return min_tokens
    return _ON_CUDA if device_type == "cuda" else _ELSEWHERE
