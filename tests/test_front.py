"""Picture against time, from the committed results."""

import pytest

from benchmarks.front import draw_front, read_points


def test_refreshes_beat_every_plain_setting():
    points = read_points()
    plain = [point for point in points if point.kind == "plain"]
    assert min(point.budget for point in plain) < 0.25 < 0.6 < max(p.budget for p in plain)
    for point in plain:
        assert any(
            other.seconds < point.seconds and other.psnr > point.psnr + 5
            for other in points
            if other.kind == "with refreshes"
        ), point


def test_seconds_are_those_of_the_measured_steps():
    """5 dense steps of 18.6 s, and 45 of 6.84 s in the table with r = 15; here r = 20 of 25."""
    point = next(one for one in read_points() if one.label.endswith("refresh 20"))
    # 20 steps: 19 between at 5.71 s, one dense, and what the prime takes beyond a dense one.
    mean = (19 * 5.714 + 18.60 + 22.37 - 18.60) / 20
    assert point.seconds == pytest.approx(5 * 18.60 + 45 * mean, rel=1e-3)


def test_every_point_is_drawn():
    points = read_points()
    axes = draw_front(points).axes[0]
    assert sum(len(line.get_xdata()) for line in axes.lines) == len(points)
