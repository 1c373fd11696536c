"""By which day a run must have got how far, or the switch to a compared cluster is cheaper."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import numpy as np

from crosschip.plan.cluster import Cluster
from crosschip.plan.dates import FallBack, fall_back
from crosschip.plan.page.document import fall_back_document
from crosschip.plan.whole_run import WholeRun

__all__ = ["fall_backs"]


def fall_backs(run: WholeRun) -> tuple[list[dict[str, Any]], list[str]]:
    """A rule for each compared cluster that the run can be on, and notes on the others."""
    found, notes = [], []
    for name, other in run.others.items():
        if not isinstance(other, WholeRun):
            notes.append(f"on {name}: {other.problem}")
            continue
        cost_a, cost_b = _cost_per_day(run.cluster), _cost_per_day(other.cluster)
        if cost_a == 0.0 and run.asked.switch.delay_per_day == 0.0:
            notes.append(
                f"no fall-back rule to {name}: neither a price of {run.cluster.name} ([price] per_chip_hour) nor "
                "--delay-cost-per-day is given"
            )
            continue
        ours, theirs = run.cluster.price.currency, other.cluster.price.currency
        if cost_b > 0.0 and ours != theirs:
            notes.append(
                f"no fall-back rule to {name}: its price is in {theirs}, the price of {run.cluster.name} and "
                f"--delay-cost-per-day are in {ours}; give all of them in one currency ([price] currency)"
            )
            continue
        if cost_b == 0.0:
            notes.append(f"{name} has no [price] per_chip_hour: the fall-back rule counts it as free")
        found.append(_rule(run, other, cost_a, cost_b))
    return found, notes


def _rule(run: WholeRun, other: WholeRun, cost_a: float, cost_b: float) -> dict[str, Any]:
    switch = run.asked.switch
    choice = FallBack(
        days_a=run.schedule.end_days(0.5), days_b=other.schedule.end_days(0.9), cost_a_per_day=cost_a,
        cost_b_per_day=cost_b, delay_per_day=switch.delay_per_day, switch_days=switch.days, switch_cost=switch.cost,
        portable=switch.portable,
    )  # fmt: skip
    document = fall_back_document(
        choice,
        fall_back(choice, run.asked.start),
        run.cluster.name,
        other.cluster.name,
        lambda share: _where(run, share),
    )
    by = run.asked.by
    if by is not None and (days := (by - run.asked.start).days + 1) > 0:
        last = choice.last_switch_day(days)
        document["last_switch"] = None if last is None else str(run.asked.start + timedelta(days=int(last)))
        document["by"] = str(by)
    return document


def _cost_per_day(cluster: Cluster) -> float:
    """Chips and, where both are given, their energy."""
    price = cluster.price
    hourly = (price.per_chip_hour or 0.0) + (price.chip_kw or 0.0) * (price.per_kwh or 0.0)
    return 24.0 * cluster.num_chips * hourly


def _where(run: WholeRun, share: float) -> str:
    """Where the plan stands (P50) when `share` of its time is over: a stage and its step."""
    day = share * run.schedule.end_days(0.5)
    spans = {
        each.stage.name: [float(np.quantile(values, 0.5)) / 86400 for values in (each.begin_s, each.end_s)]
        for each in run.schedule.stages
    }
    for stage in run.stages:
        begin, end = spans[stage.name]
        if day <= end or stage is run.stages[-1]:
            done = min(1.0, max(0.0, (day - begin) / max(end - begin, 1e-9)))
            return f"{stage.name}, step {round(done * stage.plan.steps):,} of {stage.plan.steps:,}"
    raise AssertionError("there is a last stage")
