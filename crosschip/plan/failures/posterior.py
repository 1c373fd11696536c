"""What is known of a job's and a chip's rate of stops when stops were seen: draws from their joint posterior.

The two rates are seen only as their sum, so there is no closed form. They are drawn as that sum for a job of as many
chips as were seen (`total`, stops a day) and as the chips' part over the job's (`ratio`), each by its distribution
function from one uniform number. Where all that was seen is of one number of chips, the likelihood holds the total
alone: with one more stop and the same numbers no draw of the total is lower.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from crosschip.plan.failures.rates import FailureRates

__all__ = ["MOST_STOPS_PER_DAY", "sample_posterior"]

Values = NDArray[np.float64]

MOST_STOPS_PER_DAY = 86_400.0  # one a second; the grid ends there
_TOTALS, _RATIOS = 1000, 320
_TAIL = 1e-4


def sample_posterior(rates: FailureRates, uniform: Values) -> tuple[Values, Values]:
    """Stops a day of a job and of a chip, one for each column of `uniform` (two rows of numbers in [0, 1])."""
    chips = _seen_chips(rates)
    edges, cumulated, ratios, of_ratios = _grid(rates)
    log_total = np.interp(uniform[0], cumulated, edges)
    # The ratio's distribution changes with the total: it is taken between the two nearest totals of the grid.
    place = np.clip((log_total - edges[0]) / (edges[1] - edges[0]) - 0.5, 0.0, _TOTALS - 1.0)
    below = np.minimum(place.astype(np.int64), _TOTALS - 2)
    lower, upper = (_inverse(uniform[1], ratios[row], of_ratios[row]) for row in (below, below + 1))
    ratio = np.exp(lower + (upper - lower) * (place - below))
    total = np.exp(log_total)
    return total / (1.0 + ratio), total * ratio / (1.0 + ratio) / chips


def _seen_chips(rates: FailureRates) -> float:
    """The number of chips that were seen, weighted by the days."""
    return sum(each.days * each.num_chips for each in rates.seen) / sum(each.days for each in rates.seen)


@functools.lru_cache(maxsize=8)
def _grid(rates: FailureRates) -> tuple[Values, Values, Values, Values]:
    """(edges of log total, share of the posterior below each; for each total, edges of log ratio and share below each).

    No edge hangs on how many stops were seen.
    """
    chips, days = _seen_chips(rates), sum(each.days for each in rates.seen)
    job, chip = rates.job_per_day, rates.chip_per_day.scaled(chips)
    # Where the rates would be had nothing been seen, and where without a stop in all the days.
    least = _TAIL ** (1 / (job.shape + chip.shape)) / (max(job.per_unit, chip.per_unit) + days)
    most = max(MOST_STOPS_PER_DAY, job.quantile(1 - _TAIL) + chip.quantile(1 - _TAIL))
    edges = np.linspace(np.log(least), np.log(most), _TOTALS + 1)
    log_total = ((edges[:-1] + edges[1:]) / 2)[:, None]
    low, high = (
        np.minimum(0.0, -np.log(each.per_unit + days) - log_total) + np.log(_TAIL) / each.shape for each in (chip, job)
    )
    ratios = low + (-high - low) * np.linspace(0.0, 1.0, _RATIOS + 1)
    log_ratio = (ratios[:, :-1] + ratios[:, 1:]) / 2
    log_job = log_total - np.logaddexp(0.0, log_ratio)
    log_chip = log_job + log_ratio
    mass = (
        job.shape * log_job - job.per_unit * np.exp(log_job) + chip.shape * log_chip - chip.per_unit * np.exp(log_chip)
    )
    for each in rates.seen:
        expected = (np.exp(log_job) + np.exp(log_chip) * (each.num_chips / chips)) * each.days
        mass += each.num_stops * np.log(expected) - expected
    mass += np.log(ratios[:, 1:] - ratios[:, :-1])
    peaks = mass.max(axis=1, keepdims=True)
    of_ratios = np.cumsum(np.exp(mass - peaks), axis=1)
    totals = np.log(of_ratios[:, -1]) + peaks[:, 0]
    cumulated = np.cumsum(np.exp(totals - totals.max()))
    return (
        edges,
        np.concatenate(([0.0], cumulated / cumulated[-1])),
        ratios,
        np.concatenate((np.zeros((_TOTALS, 1)), of_ratios / of_ratios[:, -1:]), axis=1),
    )


def _inverse(uniform: Values, edges: Values, cumulated: Values) -> Values:
    """For each row the value below which `uniform` of it lies; a row has edges and the share below each."""
    cell = np.clip((cumulated <= uniform[:, None]).sum(axis=1) - 1, 0, _RATIOS - 1)
    row = np.arange(len(uniform))
    low, high = cumulated[row, cell], cumulated[row, cell + 1]
    within = (uniform - low) / np.maximum(high - low, 1e-300)
    return edges[row, cell] + (edges[row, cell + 1] - edges[row, cell]) * within
