"""From metric rows to the few hundred points a plot can show."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from crosschip.report.documents import is_number

__all__ = ["MAX_POINTS", "Curve", "Series", "last_value", "series", "thin"]

# A plot is some 450 units wide: more points than this cannot be told apart and only make the page heavy.
MAX_POINTS = 300


@dataclass(frozen=True)
class Series:
    """One number over the steps, ascending; `num_bad` counts values that are not finite numbers."""

    steps: list[int]
    values: list[float]
    num_bad: int


@dataclass(frozen=True)
class Curve:
    """A thinned series: each point stands for up to `stride` values, with their mean, lowest and highest."""

    steps: list[float]
    mean: list[float]
    low: list[float]
    high: list[float]
    stride: int


def series(rows: Iterable[dict[str, Any]], key: str) -> Series:
    """`key` over `step`. Of a step that appears twice (a run went back to a checkpoint) the last value counts."""
    by_step: dict[int, float] = {}
    num_bad = 0
    for row in rows:
        step, value = row.get("step"), row.get(key)
        if value is None or not isinstance(step, int):
            continue
        if not is_number(value):
            num_bad += 1
            by_step.pop(step, None)
            continue
        by_step[step] = float(value)
    steps = sorted(by_step)
    return Series(steps, [by_step[step] for step in steps], num_bad)


def last_value(rows: Iterable[dict[str, Any]], key: str) -> float | None:
    """The value at the highest step, or `None`."""
    found = series(rows, key)
    return found.values[-1] if found.values else None


def thin(whole: Series, max_points: int = MAX_POINTS) -> Curve:
    """Cut a series into at most `max_points` runs of neighbours. The extremes stay visible in `low` and `high`."""
    stride = max(1, math.ceil(len(whole.steps) / max_points))
    cuts = range(0, len(whole.steps), stride)
    steps = [whole.steps[cut : cut + stride] for cut in cuts]
    values = [whole.values[cut : cut + stride] for cut in cuts]
    return Curve(
        steps=[sum(part) / len(part) for part in steps],
        mean=[sum(part) / len(part) for part in values],
        low=[min(part) for part in values],
        high=[max(part) for part in values],
        stride=stride,
    )
