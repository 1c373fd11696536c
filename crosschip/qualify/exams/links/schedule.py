"""How the exam's time is spent. Pure policy: no torch."""

from __future__ import annotations

from dataclasses import dataclass

from crosschip.qualify.finding import Tier

__all__ = ["Schedule", "schedule"]

_SUSTAINED_S: dict[Tier, float] = {"smoke": 30.0, "standard": 60.0, "soak": 600.0}
_SKEW_S: dict[Tier, float] = {"smoke": 5.0, "standard": 20.0, "soak": 90.0}
_LEAST_SUSTAINED_S = 8.0  # fewer seconds tell nothing of flaps
_QUICK_CONFORMANCE_S = 5.0  # that the whole plan takes on a CPU
_DRILL_FROM_S = 24.0
_SKEW_FROM_S = 45.0


@dataclass(frozen=True)
class Schedule:
    """Seconds for each part; 0 leaves a part out. `timeout_s` is the one that the drill sets and expects to hold.

    Conformance and links are given what they may take; what they leave of `session_s` is for the sustained run, up to
    `sustained_s`.
    """

    conformance_s: float
    links_s: float
    sustained_s: float
    session_s: float
    timeout_s: float
    skew_s: float
    start_s: float  # of one set of ranks

    @property
    def has_drill(self) -> bool:
        """Whether ranks are killed and stopped."""
        return self.timeout_s > 0.0


def schedule(tier: Tier, budget_s: float, num_ranks: int, start_s: float) -> Schedule:
    """Share the time: conformance first, then the links, the drill, the start skew; what is left is sustained."""
    first_s = max(2.0, budget_s - start_s)
    conformance_s = min(30.0, 0.55 * first_s)
    links_s = min(10.0 + 2.0 * num_ranks, 0.3 * first_s)
    timeout_s = 0.0 if budget_s < _DRILL_FROM_S else 3.0 if tier == "smoke" else 5.0
    skew_s = 0.0 if budget_s < _SKEW_FROM_S else min(_SKEW_S[tier], 0.15 * budget_s)
    drill_s = 2 * (start_s + 1.5 * timeout_s) if timeout_s else 0.0
    others_s = drill_s + (start_s + skew_s if skew_s else 0.0)
    session_s = first_s - others_s
    sustained_s = _SUSTAINED_S[tier] if session_s - links_s >= _LEAST_SUSTAINED_S + _QUICK_CONFORMANCE_S else 0.0
    return Schedule(conformance_s, links_s, sustained_s, session_s, timeout_s, skew_s, start_s)
