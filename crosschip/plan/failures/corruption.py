"""What silent corruption means for a run: how many are expected, and how likely a run stays without one."""

from __future__ import annotations

import math
from dataclasses import dataclass

from crosschip.plan.failures.problem import at_least, is_share
from crosschip.plan.failures.rates import Gamma

__all__ = ["Corruption", "expected_corruption"]


@dataclass(frozen=True)
class Corruption:
    """Silent corruptions of a run: expected in all, expected to stay unnoticed, and the chance that one stays."""

    expected: float
    expected_unnoticed: float
    chance_unnoticed: float

    def words(self) -> str:
        """In a sentence."""
        return (
            f"{self.expected:.2g} silent corruptions expected, {self.expected_unnoticed:.2g} of them unnoticed; "
            f"the chance that at least one stays in the weights is {self.chance_unnoticed:.0%}"
        )


def expected_corruption(rate: Gamma, num_chips: int, days: float, caught_share: float) -> Corruption:
    """Over the uncertainty of `rate` (a chip and day): the count is negative binomial, so the chance is exact."""
    at_least("num_chips", num_chips, 1)
    at_least("days", days, 0.0)
    is_share("caught_share", caught_share)
    chip_days = num_chips * days
    unnoticed = chip_days * (1 - caught_share)
    none = math.exp(-rate.shape * math.log1p(unnoticed / rate.per_unit))
    return Corruption(rate.mean * chip_days, rate.mean * unnoticed, 1 - none)
