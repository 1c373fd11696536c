"""The statistics of one task put together: shares or lengths, interval, p-values, what could have been seen. Pure."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from crosschip.handoff.answers.questions import Task
from crosschip.handoff.answers.scoring import LengthPair, Outcome
from crosschip.handoff.answers.verdicts import Verdict, holm, verdict_of
from crosschip.paired.intervals import Interval, bootstrap_lengths, bootstrap_shares, score_interval
from crosschip.paired.pairs import sign_test, table_of
from crosschip.paired.power import (
    LEAST_POWER,
    pairs_for_difference,
    pairs_for_margin,
    smallest_difference,
    smallest_length_difference,
)

__all__ = ["Levels", "TaskResult", "judge_lengths", "judge_shares", "with_verdicts"]

ONE_POINT = 0.01
_LEAST_PROBLEMS = 10  # fewer problems show no mean length


@dataclass(frozen=True)
class Levels:
    """What was stated beforehand. `margin` is a share (0.03: three points), `length_margin` relative to A's length."""

    alpha: float = 0.05
    margin: float = 0.03
    length_margin: float = 0.1
    power: float = LEAST_POWER

    @property
    def confidence(self) -> float:
        """Of the interval that has to lie within the margin: two one-sided tests at alpha."""
        return 1 - 2 * self.alpha


@dataclass(frozen=True)
class TaskResult:
    """One task. `difference`, `interval` and `margin` are B minus A in `unit`; `no_power` says why nothing shows."""

    task: Task
    unit: str
    num_problems: int
    num_pairs: int
    a: float
    b: float
    difference: float
    interval: Interval
    bootstrap: Interval
    p: float
    margin: float
    smallest_detectable: float | None
    problems_for_one_point: int | None
    problems_for_margin: int | None
    details: dict[str, Any] = field(default_factory=dict)
    no_power: str = ""
    corrected_p: float = 1.0
    verdict: Verdict = "INCONCLUSIVE"
    words: str = ""

    def document(self) -> dict[str, Any]:
        """The result for JSON."""
        return asdict(self)


def judge_shares(task: Task, outcomes: Sequence[Outcome], levels: Levels, seed: int) -> TaskResult:
    """The statistics of a task whose pairs are right or wrong; the verdict comes with all tasks together."""
    table = table_of((each.key[0], each.a, each.b) for each in outcomes)
    test, per_problem = sign_test(table.differences), table.num_pairs / max(1, len(table.sizes))
    details = {
        "both": table.both,
        "only_a": table.only_a,
        "only_b": table.only_b,
        "neither": table.neither,
        "mid_p": test.mid_p,
        "discordance": table.discordance,
        "design_effect": table.design_effect,
    }

    def problems(pairs: int | None) -> int | None:
        return None if pairs is None else math.ceil(pairs * table.design_effect / max(1.0, per_problem))

    return TaskResult(
        task,
        "share",
        len(table.sizes),
        table.num_pairs,
        table.share_a,
        table.share_b,
        table.difference,
        score_interval(table, levels.confidence),
        bootstrap_shares(table, levels.confidence, seed),
        test.exact,
        levels.margin,
        smallest_difference(table.num_effective, table.discordance, levels.alpha, levels.power),
        problems(pairs_for_difference(ONE_POINT, table.discordance, levels.alpha, levels.power)),
        problems(pairs_for_margin(levels.margin, table.discordance, levels.alpha, levels.power)),
        details,
        _no_power(task, table.num_pairs, table.share_a, table.share_b),
    )


def _no_power(task: Task, num_pairs: int, a: float, b: float) -> str:
    """Why these pairs could show nothing, whatever B is; empty where they could."""
    if num_pairs == 0:
        return "no pair was measured"
    if a == b == 0.0:
        return "no power: both sides are at 0 %, so a worse model could not be told; ask something easier"
    # A format that is always right is what shall be; a test that is always passed is too easy to show a loss.
    if a == b == 1.0 and task in ("answers", "stories"):
        return "no power: both sides are at 100 %, so a small loss could not be told; ask something harder"
    return ""


def judge_lengths(pairs: Sequence[LengthPair], unit: str, levels: Levels, seed: int) -> TaskResult:
    """The statistics of the lengths; the unit of testing is a problem's mean over its samples."""
    by_problem: defaultdict[str, list[tuple[float, float]]] = defaultdict(list)
    for pair in pairs:
        by_problem[pair.key[0]].append((pair.a, pair.b))
    if len(by_problem) < _LEAST_PROBLEMS:
        whole = Interval(-math.inf, math.inf, levels.confidence)
        words = f"{len(by_problem)} problems have a length on both sides, and {_LEAST_PROBLEMS} are needed"
        return TaskResult(
            *("length", unit, len(by_problem), len(pairs), 0.0, 0.0, 0.0, whole, whole, 1.0, 0.0, None, None, None),
            no_power=words,
        )
    means = np.array([np.mean(np.array(each), axis=0) for each in by_problem.values()])
    found = bootstrap_lengths(means[:, 0], means[:, 1], levels.confidence, seed)
    margin = levels.length_margin * found.mean_a
    seen = smallest_length_difference(found.deviation, len(means), levels.alpha, levels.power)

    def problems(wanted: float) -> int | None:
        """The width goes with one over the root of the number."""
        if wanted <= 0 or seen == 0:
            return None
        return max(_LEAST_PROBLEMS, math.ceil(len(means) * (seen / wanted) ** 2))

    return TaskResult(
        "length",
        unit,
        len(means),
        len(pairs),
        found.mean_a,
        found.mean_b,
        found.difference,
        found.interval,
        found.interval,
        found.p,
        margin,
        seen or None,
        problems(ONE_POINT * found.mean_a),
        problems(margin),
        {"median_difference": found.median_difference, "median_interval": asdict(found.median_interval)},
        "no power: neither side has any reasoning" if found.mean_a == found.mean_b == 0 else "",
    )


def with_verdicts(results: Sequence[TaskResult], levels: Levels) -> list[TaskResult]:
    """The results with their verdicts, p-values corrected for the number of tasks that could show something."""
    corrected = holm({each.task: each.p for each in results if not each.no_power})
    return [_judged(each, corrected.get(each.task, 1.0), levels) for each in results]


def _judged(result: TaskResult, corrected: float, levels: Levels) -> TaskResult:
    if result.no_power:
        return replace(result, words=result.no_power)
    is_length = result.task == "length"
    verdict = verdict_of(
        result.difference, result.interval, corrected, levels.alpha, result.margin, gains_fail=is_length
    )
    return replace(result, corrected_p=corrected, verdict=verdict, words=_words(result, verdict, corrected))


def _words(result: TaskResult, verdict: Verdict, corrected: float) -> str:
    margin = _amount(result.margin, result.unit)
    found = f"{_amount(result.difference, result.unit, signed=True)}, p = {corrected:.2g} corrected"
    if verdict == "PASS":
        return f"equivalent: the interval lies within {margin}"
    if verdict == "FAIL":
        kind = "a change" if result.task == "length" else "a drop"
        return f"{kind} beyond the margin of {margin}: {found}"
    if verdict == "PASS WITH LIMITS":
        return f"not worse, but more than the margin of {margin} better: not the same model ({found})"
    needed = result.problems_for_margin
    more = f"; it would take about {needed} problems" if needed is not None and needed > result.num_problems else ""
    return f"neither equivalent within {margin} nor proven worse ({found}){more}"


def _amount(value: float, unit: str, signed: bool = False) -> str:
    sign = "+" if signed else ""
    return f"{100 * value:{sign}.1f} points" if unit == "share" else f"{value:{sign}.1f} {unit}"
