"""RULER's multi-value and multi-query tasks in the repeated haystack; lm_eval loads this file."""

from typing import Any

from lm_eval.tasks.ruler.common_utils import (
    get_tokenizer,
    process_results,
    resolve_tokenizer_name,
)
from lm_eval.tasks.ruler.niah_utils import TEMPLATE, download_dataset
from lm_eval.tasks.ruler.prepare_niah import generate_samples, get_haystack

__all__ = ["multiquery", "multivalue", "process_results"]


def multivalue(**metadata: Any) -> Any:
    """One key with four values."""
    return _samples(metadata, num_needle_v=4)


def multiquery(**metadata: Any) -> Any:
    """Four keys, of which all are queried."""
    return _samples(metadata, num_needle_q=4)


def _samples(metadata: dict[str, Any], **needles: int) -> Any:
    tokenizer = get_tokenizer(resolve_tokenizer_name(metadata))
    samples = (
        generate_samples(
            get_haystack(type_haystack="repeat"),
            max_seq_length=length,
            template=TEMPLATE,
            type_haystack="repeat",
            type_needle_k="words",
            type_needle_v="numbers",
            TOKENIZER=tokenizer,
            **needles,
        )
        for length in metadata["max_seq_lengths"]
    )
    return download_dataset(samples)
