"""What timing returns on either kind of device."""

import pytest
import torch

from xattn_video.measure.timing import Budget, measure


def test_a_call_is_timed_as_often_as_the_budget_says():
    calls = []
    found = measure(lambda: calls.append(1), torch.device("cpu"), Budget(repeats=4))
    # One to warm up.
    assert (len(calls), found["repeats"]) == (5, 4)
    assert 0 < found["latency_ms"] < 1000
    assert found["extra_memory_gib"] is None


@pytest.mark.gpu
def test_on_a_gpu_the_median_and_the_memory_of_a_call_are_measured():
    matrix = torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16)
    found = measure(lambda: matrix @ matrix, matrix.device, Budget(repeats=10))
    # 1.4e11 operations at no more than 2e15 a second.
    assert 0.05 < found["latency_ms"] < 50
    assert 1 <= found["repeats"] < 1000
    assert found["extra_memory_gib"] >= 4096 * 4096 * 2 / 2**30
