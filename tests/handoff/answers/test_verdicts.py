"""Equivalence has to be shown: not significant is not equivalent, and several tasks are corrected for their number."""

from __future__ import annotations

import pytest

from crosschip.handoff.answers.judging import Levels, judge_shares, with_verdicts
from crosschip.handoff.answers.scoring import Outcome
from crosschip.handoff.answers.verdicts import holm, overall, verdict_of
from crosschip.paired.intervals import Interval


def outcomes(both: int, only_a: int, only_b: int, neither: int, task: str = "answers") -> list[Outcome]:
    rows = [(True, True)] * both + [(True, False)] * only_a + [(False, True)] * only_b + [(False, False)] * neither
    return [Outcome(task, (str(place), None), a, b) for place, (a, b) in enumerate(rows)]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("difference", "interval", "p", "verdict"),
    [
        (0.0, (-0.02, 0.02), 1.0, "PASS"),
        (-0.02, (-0.029, -0.011), 0.001, "PASS"),  # a drop, significant, and harmless as stated beforehand
        (-0.02, (-0.05, 0.01), 0.3, "INCONCLUSIVE"),  # not significant is not equivalent
        (-0.08, (-0.12, -0.04), 0.001, "FAIL"),
        (-0.08, (-0.2, 0.01), 0.2, "INCONCLUSIVE"),
        (-0.02, (-0.035, -0.005), 0.01, "INCONCLUSIVE"),  # significant, and perhaps harmless
        (0.08, (0.04, 0.12), 0.001, "PASS WITH LIMITS"),
    ],
)
def test_verdicts(difference: float, interval: tuple[float, float], p: float, verdict: str) -> None:
    assert verdict_of(difference, Interval(*interval, 0.9), p, 0.05, 0.03) == verdict


def test_longer_is_no_better() -> None:
    assert verdict_of(0.08, Interval(0.04, 0.12, 0.9), 0.001, 0.05, 0.03, gains_fail=True) == "FAIL"


def test_holm() -> None:
    found = holm({"a": 0.04, "b": 0.01, "c": 0.03})
    assert found == pytest.approx({"b": 0.03, "c": 0.06, "a": 0.06})
    assert holm({}) == {}


def test_a_drop_in_one_of_many_tasks_counts_for_less() -> None:
    """p = 0.016 alone fails; among three other tasks it does not, and then more problems are asked for."""
    lost = judge_shares("answers", outcomes(180, 8, 0, 12)[:200], Levels(), 0)
    assert with_verdicts([lost], Levels())[0].verdict == "FAIL"
    few = judge_shares("answers", outcomes(182, 7, 0, 11), Levels(), 0)
    quiet = [judge_shares(task, outcomes(150, 5, 5, 40), Levels(), 0) for task in ("stories", "tools", "format")]
    first = with_verdicts([few, *quiet], Levels())[0]
    assert few.p == pytest.approx(2 * 0.5**7)
    assert first.corrected_p == pytest.approx(4 * few.p)
    assert first.verdict == "INCONCLUSIVE"
    assert with_verdicts([few], Levels())[0].verdict == "FAIL"


@pytest.mark.parametrize(("right", "words"), [(0, "0 %"), (200, "100 %")])
def test_both_at_an_end_have_no_power(right: int, words: str) -> None:
    result = judge_shares("answers", outcomes(right, 0, 0, 200 - right), Levels(), 0)
    assert words in result.no_power
    assert with_verdicts([result], Levels())[0].verdict == "INCONCLUSIVE"


def test_a_format_that_is_always_right_is_what_shall_be() -> None:
    result = judge_shares("format", outcomes(200, 0, 0, 0, "format"), Levels(), 0)
    assert not result.no_power
    assert with_verdicts([result], Levels())[0].verdict == "PASS"


def test_inconclusive_says_what_it_would_take() -> None:
    result = with_verdicts([judge_shares("answers", outcomes(30, 2, 2, 6), Levels(), 0)], Levels())[0]
    assert result.verdict == "INCONCLUSIVE"
    assert result.problems_for_margin is not None
    assert f"about {result.problems_for_margin} problems" in result.words
    assert result.problems_for_margin > 40


@pytest.mark.parametrize(
    ("tasks", "critical", "verdict"),
    [
        ([("answers", "PASS", True), ("format", "PASS", True)], "answers", "PASS"),
        ([("answers", "PASS", True), ("tools", "INCONCLUSIVE", False)], "answers", "PASS WITH LIMITS"),
        ([("answers", "INCONCLUSIVE", False), ("format", "PASS", True)], "answers", "INCONCLUSIVE"),
        ([("tools", "INCONCLUSIVE", False)], "", "INCONCLUSIVE"),
        ([("answers", "PASS", True), ("format", "FAIL", True)], "answers", "FAIL"),
        ([("answers", "INCONCLUSIVE", True), ("format", "PASS", True)], "answers", "INCONCLUSIVE"),
        ([], "answers", "INCONCLUSIVE"),
    ],
)
def test_one_verdict_of_several(tasks: list[tuple[str, str, bool]], critical: str, verdict: str) -> None:
    assert overall(tasks, critical) == verdict  # type: ignore[arg-type]
