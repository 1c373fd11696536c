"""Series for pages: short, with their ends, safe for JSON."""

from __future__ import annotations

from crosschip.qualify.exams.stability.series import MOST_POINTS, finite, thinned


def test_a_long_series_keeps_its_ends() -> None:
    found = thinned([float(each) for each in range(5000)], [float(each * 2) for each in range(5000)])
    assert len(found) == MOST_POINTS
    assert (found[0], found[-1]) == ([0.0, 0.0], [4999.0, 9998.0])
    assert [point[0] for point in found] == sorted({point[0] for point in found if point[0] is not None})


def test_a_short_one_is_kept_whole() -> None:
    assert thinned([0.0, 1.0], [5.0, float("nan")]) == [[0.0, 5.0], [1.0, None]]
    assert thinned([], []) == []


def test_numbers_for_json() -> None:
    assert finite(1 / 3) == 0.333333
    assert finite(None) is None
    assert finite(float("inf")) is None
