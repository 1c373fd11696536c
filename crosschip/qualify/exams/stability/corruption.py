"""What repeats of fixed work say about silent corruption: a rate with its bounds, and what it means for many chips.

Pure policy: no torch. No test clears a chip: the Llama 3 report counts six such stops in 884,736 GPU-days, a rate that
one chip shows in four centuries. So detection belongs into the run as well.
"""

from __future__ import annotations

from dataclasses import dataclass

from scipy.special import gammaincinv

__all__ = ["PLANNED_CHIPS", "MismatchRate", "implied_words", "mismatch_rate", "rate_words"]

PLANNED_CHIPS = (1_000, 10_000)  # where the plan is not told
_LEVEL = 0.95
_HOUR_S = 3600.0


@dataclass(frozen=True)
class MismatchRate:
    """Mismatches per device-hour; each bound holds with a confidence of 95 % if mismatches come independently."""

    mismatches: int
    device_hours: float
    per_hour: float
    lower: float
    upper: float

    def per_day(self, num_chips: int) -> tuple[float, float]:
        """Mismatches a day on so many chips: expected, and at most (the upper bound)."""
        return self.per_hour * 24.0 * num_chips, self.upper * 24.0 * num_chips


def mismatch_rate(mismatches: int, device_s: float) -> MismatchRate:
    """The rate with the exact bounds of a Poisson count (Garwood 1936); without any mismatch at most 3.0 / time.

    Raises:
        ValueError: no time was spent, so nothing is known.
    """
    if device_s <= 0.0:
        raise ValueError(f"no rate can be had from {device_s} s of work")
    hours = device_s / _HOUR_S
    lower = float(gammaincinv(mismatches, 1.0 - _LEVEL)) if mismatches else 0.0
    upper = float(gammaincinv(mismatches + 1, _LEVEL))
    return MismatchRate(mismatches, hours, mismatches / hours, lower / hours, upper / hours)


def rate_words(rate: MismatchRate) -> str:
    """The rate in a sentence that says how little a short soak proves."""
    spent = f"{rate.device_hours:.2g} device-hours"
    if rate.mismatches == 0:
        return f"no mismatch in {spent}: the rate is below {_plain(rate.upper)} per device-hour (95 %)"
    return (
        f"{rate.mismatches} in {spent}: {_plain(rate.per_hour)} per device-hour, "
        f"between {_plain(rate.lower)} and {_plain(rate.upper)} (95 % each)"
    )


def implied_words(rate: MismatchRate, planned_chips: tuple[int, ...]) -> str:
    """What the rate means for so many chips."""
    each = []
    for chips in planned_chips:
        expected, most = rate.per_day(chips)
        shown = f"{_plain(expected)} a day expected" if rate.mismatches else f"up to {_plain(most)} a day not excluded"
        each.append(f"on {chips:,} chips {shown}")
    return "; ".join(each)


def _plain(number: float) -> str:
    """Three digits, without an exponent: 1,070 and 0.0012."""
    if number >= 1000:
        digits = len(str(int(number)))
        return f"{round(number, 3 - digits):,.0f}"
    return f"{number:.3g}"
