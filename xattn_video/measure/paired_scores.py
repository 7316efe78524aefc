"""The scores of a setting in a harness, compared with dense attention on the same samples."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any

from xattn_video.measure.paired_difference import Difference, paired_difference

Record = dict[str, Any]


@dataclass(frozen=True, slots=True)
class PairedScores:
    """The scores of one or several tasks with one setting.

    Attributes:
        samples: Number of samples.
        score: Mean of the scores.
        difference: Difference from dense attention; None for dense attention itself.
        density: Mean density of the tasks; None for dense attention.
        seconds: Seconds of all samples.
    """

    samples: int
    score: float
    difference: Difference | None
    density: float | None
    seconds: float

    @classmethod
    def of(cls, dense: Sequence[Record], records: Sequence[Record]) -> "PairedScores":
        """Pair the records of tasks with those of dense attention.

        Args:
            dense: A record for each task: ``scores`` by sample, ``density`` and ``seconds``.
            records: Records of the same tasks with a setting, or ``dense`` itself.
        """
        first, second = (
            {
                f"{number} {sample}": value
                for number, one in enumerate(run)
                for sample, value in one["scores"].items()
            }
            for run in (dense, records)
        )
        densities = [one["density"] for one in records if one["density"] is not None]
        return cls(
            len(second),
            mean(second.values()),
            None if records is dense else paired_difference(first, second, {k: k for k in first}),
            mean(densities) if densities else None,
            sum(one["seconds"] for one in records),
        )
