"""From how many video tokens on sparse attention has been measured to pay."""

_ON_CUDA = 16384
_ELSEWHERE = 2048


def default_min_tokens(device_type: str) -> int:
    """The ``min_tokens`` of a device where none is given.

    With half of the blocks kept XAttention beats the best dense kernel from here on: on CUDA by
    every fast backend, as measured on an H100; elsewhere as on a CPU, whose shortest measured
    length this is. docs/benchmarks.md has the curves.
    """
    return _ON_CUDA if device_type == "cuda" else _ELSEWHERE
