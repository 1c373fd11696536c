from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from crosschip.report.curves import Series, last_value, series, thin
from crosschip.report.figures import bytes_text, count, duration, percent


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=500), st.integers(1, 40))
def test_thinning_keeps_extremes_and_the_limit(values: list[float], max_points: int) -> None:
    curve = thin(Series(list(range(len(values))), values, 0), max_points)
    assert len(curve.steps) <= max_points
    assert min(curve.low) == min(values)
    assert max(curve.high) == max(values)
    assert curve.steps == sorted(curve.steps)


def test_short_series_is_left_alone() -> None:
    curve = thin(Series([1, 2, 3], [5.0, 4.0, 3.0], 0))
    assert (curve.mean, curve.stride) == ([5.0, 4.0, 3.0], 1)


def test_series_takes_the_last_value_of_a_repeated_step_and_counts_bad_ones() -> None:
    rows = [
        {"step": 2, "loss": 3.0},
        {"step": 1, "loss": 4.0},
        {"step": 2, "loss": 2.5},
        {"step": 3, "loss": float("nan")},
    ]
    rows += [{"step": "4", "loss": 1.0}, {"step": 5, "loss": "low"}, {"step": 6}]
    assert series(rows, "loss") == Series([1, 2], [4.0, 2.5], 2)
    assert last_value(rows, "loss") == 2.5
    assert last_value([], "loss") is None


def test_numbers_as_people_read_them() -> None:
    assert count(1234567).replace("\u202f", " ") == "1 234 567"
    assert duration(0.44).replace("\u202f", " ") == "0.4 s"
    assert duration(3 * 3600 + 59).replace("\u202f", " ") == "3 h 1 min"
    assert percent(1.0).replace("\u202f", " ") == "100 %"
    assert [percent(share, 0)[:-2] for share in (0.0, 0.004, 0.1, 0.5, 1.0)] == ["0", "0", "10", "50", "100"]
    assert percent(0.9999).replace("\u202f", " ") == "99.9 %"  # not all were right, so it is not 100 %
    assert bytes_text(13_650_000).replace("\u202f", " ") == "13.7 MB"
