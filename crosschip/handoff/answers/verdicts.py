"""From the statistics of each kind of task to a verdict, and from those to one. Pure.

"No significant difference" is no equivalence: PASS needs the whole interval within a margin that was stated before, as
two one-sided tests do (TOST), and what is neither shown nor refuted is INCONCLUSIVE, with what it would take.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from crosschip.paired.intervals import Interval

__all__ = ["Verdict", "holm", "overall", "verdict_of"]

Verdict = Literal["PASS", "PASS WITH LIMITS", "FAIL", "INCONCLUSIVE"]


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """The p-values corrected for their number (Holm 1979): each may be held against alpha by itself."""
    ordered = sorted(p_values.items(), key=lambda item: item[1])
    corrected, largest = {}, 0.0
    for place, (name, p) in enumerate(ordered):
        largest = max(largest, min(1.0, p * (len(ordered) - place)))
        corrected[name] = largest
    return corrected


def verdict_of(
    difference: float, interval: Interval, corrected_p: float, alpha: float, margin: float, *, gains_fail: bool = False
) -> Verdict:
    """PASS: the interval lies within the margin. FAIL: a significant drop that is larger than the margin.

    A significant gain beyond the margin is another model, but no worse one: PASS WITH LIMITS, or FAIL with
    `gains_fail`, where longer is no better. Everything else is INCONCLUSIVE.
    """
    if interval.is_within(margin):
        return "PASS"
    if corrected_p <= alpha and abs(difference) > margin:
        if difference < 0 or gains_fail:
            return "FAIL"
        if interval.low > -margin:
            return "PASS WITH LIMITS"
    return "INCONCLUSIVE"


def overall(verdicts: Sequence[tuple[str, Verdict, bool]], critical: str) -> Verdict:
    """One verdict of (task, verdict, whether the task could show anything).

    A task without power is not covered, which is a limit, unless it is the `critical` one or none has power.
    """
    if any(verdict == "FAIL" for _, verdict, _ in verdicts):
        return "FAIL"
    told = [(task, verdict) for task, verdict, has_power in verdicts if has_power]
    silent = [task for task, _, has_power in verdicts if not has_power]
    if not told or critical in silent or any(verdict == "INCONCLUSIVE" for _, verdict in told):
        return "INCONCLUSIVE"
    return "PASS WITH LIMITS" if silent or any(verdict != "PASS" for _, verdict in told) else "PASS"
