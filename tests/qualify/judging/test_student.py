"""Student's t against tables and closed forms."""

from __future__ import annotations

import math

import pytest

from crosschip.qualify.judging.student import student_tail, student_threshold


@pytest.mark.parametrize(
    ("level", "freedom", "expected"),
    [(0.05, 1, 6.3138), (0.05, 4, 2.1318), (0.025, 10, 2.2281), (0.01, 30, 2.4573), (0.05, 29, 1.6991)],
)
def test_thresholds_are_those_of_the_tables(level: float, freedom: int, expected: float) -> None:
    assert student_threshold(level, freedom) == pytest.approx(expected, abs=1e-4)
    assert student_tail(expected, freedom) == pytest.approx(level, abs=1e-5)


def test_the_tail_of_one_degree_of_freedom_is_the_arc_tangent() -> None:
    for t in (-3.0, 0.0, 0.2, 5.0, 1e4):
        assert student_tail(t, 1) == pytest.approx(0.5 - math.atan(t) / math.pi, rel=1e-6)


def test_both_tails_are_one_and_infinity_has_none() -> None:
    for t, freedom in ((0.3, 29), (2.5, 10), (-1.0, 31)):
        assert student_tail(t, freedom) + student_tail(-t, freedom) == pytest.approx(1.0)
    assert (student_tail(math.inf, 7), student_tail(-math.inf, 7)) == (0.0, 1.0)
