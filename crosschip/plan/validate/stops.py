"""The share of time in which a run on one cluster trains: what its stops leave, by the failure model of whole plans.

Nothing of the model or the chip's speed is needed: the median moves by less than half a point between a run of one day
and one of a hundred and twenty. The published days of a row are an outcome, and are not read.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from crosschip.plan.failures import published_rates, simulate, usual_recovery
from crosschip.plan.failures.published import facts
from crosschip.plan.hardware import kind_named, usual_host
from crosschip.plan.validate.cases import CannotPredict, refuse_unpredictable
from crosschip.plan.validate.numbers import MOST_COUNT
from crosschip.plan.validate.parallelism import layout_words
from crosschip.plan.validate.rows import TIME_SHARE, Row

__all__ = ["StoppedRun", "is_of_stops", "stopped_run", "training_shares"]

_DAYS = 30.0
_NUM_TRIALS, _SEED = 1000, 0
_USUAL_HOST = 8


@dataclass(frozen=True)
class StoppedRun:
    """A row of a run on one cluster whose share of time that trains is asked for; its hosts have `host_size` chips."""

    row: Row
    num_chips: int
    host_size: int
    notes: tuple[str, ...]


def is_of_stops(row: Row) -> bool:
    """Whether a row's quantity is what stops leave of a run's time: its share of time, unless groups exchange over
    thin links, where it is the share of a round that computes."""
    return row.quantity == TIME_SHARE and row.kind != "lowcomm_run" and "loco" not in row.parallelism.lower()


def stopped_run(row: Row) -> StoppedRun:
    """What the failure model needs of a row.

    Raises:
        CannotPredict: a cell cannot be read, or nobody says how many chips there are.
    """
    refuse_unpredictable(row)
    notes = list(row.readings)
    num_chips = row.num_chips or layout_words(row.parallelism, None).num_chips
    if num_chips is None:
        raise CannotPredict("no number of chips", "fill n_chips: how often a run stops hangs on it")
    if num_chips > MOST_COUNT:
        raise CannotPredict(f"{num_chips:.3g} chips in parallelism = {row.parallelism!r}", "mend the widths")
    if row.num_chips is None:
        notes.append(f"number of chips not given: {num_chips} taken, the product of the layout's widths")
    hardware = kind_named(row.chip)
    host_size = round(usual_host(_USUAL_HOST).value) if hardware is None else hardware.host_size
    if hardware is None:
        notes.append(f"no figures for the chip {row.chip!r}: hosts of {host_size} chips assumed")
    notes.append(f"{_DAYS:g} days with the usual saves and restarts assumed")
    if systems := sorted({each.system for each in facts("chip rate") if each.num_chips == num_chips}):
        notes.append(f"the rates of stops rest on fleets that may be this one, too: {', '.join(systems)}")
    return StoppedRun(row, num_chips, host_size, tuple(notes))


def training_shares(run: StoppedRun) -> tuple[float, float, float]:
    """P10, P50 and P90 of the share of time that trains, in percent.

    Raises:
        PlanError: so many chips stop so often that nothing comes to an end.
    """
    rates = published_rates()
    recovery = usual_recovery(rates, run.num_chips, run.host_size)
    ledger = simulate(
        rates.sample(_NUM_TRIALS, _SEED), run.num_chips, recovery, work_s=_DAYS * 86_400.0, seed=(_SEED, 1)
    )
    low, middle, high = (100.0 * float(each) for each in np.quantile(ledger.goodput, (0.1, 0.5, 0.9)))
    return low, middle, high
