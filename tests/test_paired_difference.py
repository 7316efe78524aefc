"""The paired bootstrap of a difference between two runs."""

import numpy as np
import pytest

from xattn_video.measure.paired_difference import paired_difference


def test_the_interval_is_the_paired_bootstraps():
    rng = np.random.default_rng(1)
    names = [f"{number}" for number in range(400)]
    prompts = {name: name for name in names}
    first = dict(zip(names, rng.normal(0, 10, 400), strict=True))
    noise = dict(zip(names, rng.normal(0.1, 0.5, 400), strict=True))
    second = {name: first[name] + noise[name] for name in names}
    found = paired_difference(first, second, prompts)
    differences = np.array(list(noise.values()))
    half = 1.96 * differences.std() / 20
    assert found.pairs == 400
    assert found.mean == pytest.approx(differences.mean())
    assert found.low == pytest.approx(differences.mean() - half, abs=0.1 * half)
    assert found.high == pytest.approx(differences.mean() + half, abs=0.1 * half)
    assert paired_difference(first, second, prompts) == found


def test_videos_of_one_prompt_are_resampled_together():
    names = [f"{prompt}-{video}" for prompt in range(20) for video in range(5)]
    zeros = dict.fromkeys(names, 0.0)
    values = {name: float(int(name.split("-")[0]) % 2) for name in names}
    alone = paired_difference(zeros, values, {name: name for name in names})
    together = paired_difference(zeros, values, {name: name.split("-")[0] for name in names})
    assert together.high - together.low > 1.8 * (alone.high - alone.low)


def test_only_shared_videos_are_paired():
    found = paired_difference(
        {"a": 1.0, "b": 2.0}, {"b": 3.0, "c": 9.0}, dict.fromkeys("abc", "p")
    )
    assert (found.pairs, found.mean, found.low, found.high) == (1, 1.0, None, None)
    assert paired_difference({"a": 1.0}, {"b": 1.0}, {}) is None
