"""How often a job stops: a rate per job and a rate per chip, each uncertain, and what was seen since.

Stops a day = job rate + chip rate x chips. The job term holds what does not grow with the machine (defects of the
software, dependencies, people); without it a job of 1,024 GPUs would stop every 28.8 h where 7.9 h were measured. Each
rate is a gamma distribution whose mean and spread are those of the published fleets, because the next fleet differs
from them as they differ from one another; that spread is far wider than any one fleet's Poisson error.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy.special import gammaincinv
from scipy.stats import norm
from scipy.stats import t as student_t

from crosschip.plan.failures.posterior import MOST_STOPS_PER_DAY, sample_posterior
from crosschip.plan.failures.problem import PlanError, at_least, positive
from crosschip.plan.failures.published import facts

__all__ = ["FailureRates", "Gamma", "Observation", "SampledRates", "fit_gamma", "published_rates", "upper_bound"]

Values = NDArray[np.float64]

_CORRUPTION_SHAPE = 0.5  # assumed: one faulty chip has shown twenty times the published rate (ZAYA1: one a week)


@dataclass(frozen=True)
class Gamma:
    """A gamma distribution of a rate: `shape`, and `per_unit` in the inverse of the rate's unit."""

    shape: float
    per_unit: float

    def __post_init__(self) -> None:
        positive("the shape of a gamma distribution", self.shape)
        positive("the scale of a gamma distribution", self.per_unit)

    @property
    def mean(self) -> float:
        """The expected rate."""
        return self.shape / self.per_unit

    def quantile(self, share: float) -> float:
        """The rate below which `share` of the distribution lies."""
        return float(gammaincinv(self.shape, share)) / self.per_unit

    def at(self, uniform: Values) -> Values:
        """The rates below which these shares of the distribution lie; more events seen give none that is lower."""
        return np.asarray(gammaincinv(self.shape, uniform), dtype=np.float64) / self.per_unit

    def scaled(self, factor: float) -> Gamma:
        """The distribution of `factor` times the rate."""
        positive("the factor on a rate", factor)
        return Gamma(self.shape, self.per_unit / factor)


def fit_gamma(rates: Sequence[float]) -> Gamma:
    """The rate of a further fleet, by moments: the mean of `rates`, their variance and the error of that mean.

    So few fleets do not tell their own spread well, so it is widened as far as Student's t widens P10 to P90.

    Raises:
        PlanError: fewer than two rates, none of their spread, or one that is not positive.
    """
    for rate in rates:
        positive("a published rate", rate)
    if len(set(rates)) < 2:
        raise PlanError(f"{len(set(rates))} different rates give no spread", "give at least two")
    mean, variance = float(np.mean(rates)), float(np.var(rates, ddof=1)) * (1 + 1 / len(rates))
    variance *= float(student_t.ppf(0.9, len(rates) - 1) / norm.ppf(0.9)) ** 2
    return Gamma(mean**2 / variance, mean / variance)


@dataclass(frozen=True)
class Observation:
    """What was seen on the very chips of the plan: `num_stops` in `days` with `num_chips` at work."""

    num_stops: int
    days: float
    num_chips: int

    def __post_init__(self) -> None:
        at_least("num_stops", self.num_stops, 0)
        positive("days", self.days)
        at_least("num_chips", self.num_chips, 1)
        if self.num_stops > MOST_STOPS_PER_DAY * self.days:
            raise PlanError(
                f"{self.num_stops:,} stops in {self.days:g} days are more than one a second",
                "give the stops of a job, and the days that it was at work",
            )


@dataclass(frozen=True)
class SampledRates:
    """Draws, one for each trial: stops a day of a job, of a chip, and silent corruptions a day of a chip."""

    job_per_day: Values
    chip_per_day: Values
    corruption_per_day: Values

    def __len__(self) -> int:
        return len(self.job_per_day)

    def scaled(self, factor: float) -> SampledRates:
        """Every rate times `factor`."""
        return SampledRates(self.job_per_day * factor, self.chip_per_day * factor, self.corruption_per_day * factor)

    def stops_per_day(self, num_chips: int) -> Values:
        """Stops a day of a job on so many chips, corruption left out."""
        return self.job_per_day + self.chip_per_day * num_chips


@dataclass(frozen=True)
class FailureRates:
    """The rates as known: a prior for each, and what was seen since. `is_given` rates are points without a spread."""

    job_per_day: Gamma
    chip_per_day: Gamma
    corruption_per_day: Gamma
    seen: tuple[Observation, ...] = ()

    def with_seen(self, *observations: Observation) -> FailureRates:
        """The same prior with more seen."""
        return replace(self, seen=(*self.seen, *observations))

    def sample(self, num: int, seed: int) -> SampledRates:
        """`num` draws of all rates, from the prior or, where something was seen, from the posterior.

        The same seed gives the same luck, whatever was seen: fewer stops give no draw with more of them.
        """
        uniform = np.random.default_rng(seed).random((3, num))
        corruption = self.corruption_per_day.at(uniform[0])
        if self.seen:
            return SampledRates(*sample_posterior(self, uniform[1:]), corruption)
        return SampledRates(self.job_per_day.at(uniform[1]), self.chip_per_day.at(uniform[2]), corruption)

    def hours_between_stops(self, num_chips: int, num: int = 20_000, seed: int = 0) -> tuple[float, float, float]:
        """P10, P50 and P90 of the mean time between stops of a job on so many chips, in hours."""
        at_least("num_chips", num_chips, 1)
        hours = 24.0 / self.sample(num, seed).stops_per_day(num_chips)
        low, middle, high = (float(each) for each in np.quantile(hours, (0.1, 0.5, 0.9)))
        return low, middle, high


def published_rates(without: str | None = None) -> FailureRates:
    """The priors from the published fleets; `without` leaves out the rows whose id begins so, to test the others."""

    def rates(use: str) -> list[float]:
        return [row.value for row in facts(use) if without is None or not row.id.startswith(without)]

    corruption = facts("corruption rate")[0].value
    return FailureRates(
        fit_gamma(rates("job rate")),
        fit_gamma(rates("chip rate")),
        Gamma(_CORRUPTION_SHAPE, _CORRUPTION_SHAPE / corruption),
    )


def upper_bound(num_events: int, exposure: float, level: float = 0.95) -> float:
    """The rate that `num_events` in `exposure` do not exclude (Garwood 1936); without an event 3.0 / exposure."""
    at_least("num_events", num_events, 0)
    positive("exposure", exposure)
    return float(gammaincinv(num_events + 1, level)) / exposure
