"""What a qualification report's soak says about failures: stops and mismatches in so many chip-hours of work.

A soak of hours on a few chips proves little: three events an exposure are not excluded (the rule of three). It is
taken as evidence beside the published fleets, and its own bound stands beside it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from crosschip.plan.failures.problem import PlanError
from crosschip.plan.failures.rates import FailureRates, Gamma, upper_bound

__all__ = ["Soak", "read_soak", "with_soak"]

_STABILITY = "stability"


@dataclass(frozen=True)
class Soak:
    """A chip's soak: chip-hours of compared work, silent mismatches, and stops (the exam crashed or hung)."""

    chip: str
    device_hours: float
    mismatches: int
    stops: int

    @property
    def chip_rate_bound(self) -> float:
        """Stops a chip and day that the soak does not exclude (95 %)."""
        return upper_bound(self.stops, self.device_hours / 24)

    def words(self, num_chips: int) -> str:
        """What the soak shows, and what it leaves open for a job of so many chips."""
        return (
            f"{self.chip}: {self.stops} stops and {self.mismatches} mismatches in {self.device_hours:.3g} chip-hours; "
            f"that leaves up to {self.chip_rate_bound * num_chips:.3g} stops a day on {num_chips:,} chips open"
        )


def read_soak(report: dict[str, Any]) -> Soak:
    """The soak of a qualification report.

    Raises:
        PlanError: the document is no qualification report, or its stability exam did no compared work.
    """
    if not isinstance(report, dict) or report.get("document") != "qualification":
        raise PlanError("the report is no qualification report", "give the JSON that crosschip qualify wrote")
    exams = [exam for exam in _objects(report.get("exams")) if exam.get("exam") == _STABILITY]
    rates = [
        each
        for exam in exams
        for each in _objects(exam.get("measurements"))
        if each.get("check") == "silent corruption" and isinstance(each.get("device_hours"), int | float)
    ]
    hours = sum(float(each["device_hours"]) for each in rates)
    if not hours > 0:
        raise PlanError(
            f"the report on {report.get('chip', '?')} holds no soak: its stability exam compared no work",
            "qualify with --exams stability --minutes 60, or plan without --report",
        )
    # An exam that crashes or hangs is begun again without that part; each such end is a finding of its own.
    stops = sum(
        each.get("exam") == _STABILITY and each.get("check") in ("crash", "hang")
        for each in _objects(report.get("findings"))
    )
    return Soak(str(report.get("chip", "?")), hours, sum(int(each.get("mismatches", 0)) for each in rates), stops)


def with_soak(rates: FailureRates, soak: Soak) -> FailureRates:
    """The rates with the soak as evidence.

    A soak has no job around it, so its stops speak of the chip's rate alone; that and the corruption's rate are gamma
    distributions, which a Poisson count turns into gamma distributions.
    """
    days = soak.device_hours / 24
    chip, corruption = rates.chip_per_day, rates.corruption_per_day
    return FailureRates(
        rates.job_per_day,
        Gamma(chip.shape + soak.stops, chip.per_unit + days),
        Gamma(corruption.shape + soak.mismatches, corruption.per_unit + days),
        rates.seen,
    )


def _objects(value: Any) -> Iterator[dict[str, Any]]:
    if isinstance(value, list):
        yield from (each for each in value if isinstance(each, dict))
