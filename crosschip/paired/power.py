"""What a comparison could have seen: power, the smallest difference, how many problems another margin needs. Pure.

Power is summed over how many pairs differ and how many of those are gains, so it holds where few differ; the usual
normal approximation promises too much there (0.67 for 0.8, of 286 pairs of which 3 % differ).
"""

from __future__ import annotations

import math

import numpy as np
from scipy import optimize, stats

from crosschip.paired.intervals import score_statistic

__all__ = [
    "LEAST_POWER",
    "pairs_for_difference",
    "pairs_for_margin",
    "power_of_equivalence",
    "power_of_test",
    "smallest_difference",
    "smallest_length_difference",
]

LEAST_POWER = 0.8
_TAIL = 1e-10
_MOST_PAIRS = 10_000_000
_MANY_DIFFER = 500  # pairs, from which on the normal approximation is good to half a point


def power_of_test(num_pairs: float, discordance: float, drop: float, alpha: float) -> float:
    """The chance that McNemar's exact two-sided test finds a drop of `drop` (a share) at level `alpha`.

    `discordance` is the share of pairs that differ; at least `drop` of them must.
    """
    num = int(num_pairs)
    discordance = max(discordance, drop)
    if num <= 0 or discordance <= 0:
        return 0.0
    low, high = stats.binom.ppf([_TAIL, 1 - _TAIL], num, discordance)
    differing = np.arange(int(low), int(high) + 1)
    # The largest number of gains at which the test still rejects: twice the lower tail of a fair coin within alpha.
    allowed = stats.binom.ppf(alpha / 2, differing, 0.5)
    allowed = allowed - (stats.binom.cdf(allowed, differing, 0.5) > alpha / 2)
    gains = (discordance - drop) / (2 * discordance)
    finds = np.where(allowed >= 0, stats.binom.cdf(allowed, differing, gains), 0.0)
    return float((stats.binom.pmf(differing, num, discordance) * finds).sum())


def smallest_difference(num_pairs: float, discordance: float, alpha: float, power: float = LEAST_POWER) -> float | None:
    """The smallest drop, as a share, that is found with the power; None if not even a drop of everything is."""

    def short(drop: float) -> float:
        return power_of_test(num_pairs, discordance, drop, alpha) - power

    if short(1.0) < 0:
        return None
    return float(optimize.brentq(short, 1e-9, 1.0, xtol=1e-6))


def pairs_for_difference(drop: float, discordance: float, alpha: float, power: float = LEAST_POWER) -> int | None:
    """How many independent pairs find a drop of `drop` with the power; None beyond ten millions.

    The exact power has teeth, so it is looked for from what the normal approximation gives (Connor 1987) upwards.
    """
    discordance = max(discordance, drop)
    z_alpha, z_power = stats.norm.ppf(1 - alpha / 2), stats.norm.ppf(power)
    guess = (z_alpha * math.sqrt(discordance) + z_power * math.sqrt(max(0.0, discordance - drop**2))) ** 2 / drop**2
    num = max(1, int(guess * 0.9))
    while power_of_test(num, discordance, drop, alpha) < power:
        num = math.ceil(num * 1.01) + 1
        if num > _MOST_PAIRS:
            return None
    return num


def power_of_equivalence(num_pairs: float, discordance: float, margin: float, alpha: float) -> float:
    """The chance that the score interval lies within the margin, where there is no difference: summed over outcomes."""
    num = int(num_pairs)
    low, high = stats.binom.ppf([_TAIL, 1 - _TAIL], num, discordance)
    differing = np.arange(int(low), int(high) + 1)[:, None]
    gains = np.arange(int(high) + 1)[None, :]
    lost = np.maximum(differing - gains, 0)
    z = stats.norm.ppf(1 - alpha)
    above = score_statistic(gains, lost, num, -margin) > z
    below = score_statistic(gains, lost, num, margin) < -z
    chances = stats.binom.pmf(differing, num, discordance) * stats.binom.pmf(gains, differing, 0.5)
    return float((chances * (above & below)).sum())


def pairs_for_margin(margin: float, discordance: float, alpha: float, power: float = LEAST_POWER) -> int:
    """How many independent pairs show equivalence within the margin, with the power, where there is no difference.

    n = discordance x (z_alpha + z_power/2)^2 / margin^2 from the width of the interval of two one-sided tests, and from
    there upwards where so few pairs differ that the normal approximation promises too much.
    """
    z_alpha, z_power = stats.norm.ppf(1 - alpha), stats.norm.ppf((1 + power) / 2)
    by_width = discordance * (z_alpha + z_power) ** 2 / margin**2
    none_differs = z_alpha**2 * (1 - margin) / margin
    num = math.ceil(max(by_width, none_differs))
    if num * discordance > _MANY_DIFFER:
        return num
    while power_of_equivalence(num, discordance, margin, alpha) < power:
        num = math.ceil(num * 1.02) + 1
    return num


def smallest_length_difference(deviation: float, num: int, alpha: float, power: float = LEAST_POWER) -> float:
    """The smallest difference of two mean lengths that is found with the power, from the deviation of differences."""
    return float((stats.norm.ppf(1 - alpha / 2) + stats.norm.ppf(power)) * deviation / math.sqrt(num))
