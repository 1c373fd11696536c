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
        why_none = _why_none(run, other)
        if why_none is not None:
            notes.append(f"no fall-back rule to {name}: {why_none}")
            continue
        notes += [
            f"{each.name} has no [price] per_chip_hour: the fall-back rule to {name} counts it as free"
            for each in _all_of_them(run, other)
            if _cost_per_day(each) == 0.0
        ]
        found.append(_rule(run, other))
    return found, notes


def _why_none(run: WholeRun, other: WholeRun) -> str | None:
    """Why what the two cost cannot be compared; None where it can."""
    names = " and ".join(each.name for each in run.clusters)
    if not any(map(_cost_per_day, run.clusters)) and run.asked.switch.delay_per_day == 0.0:
        return f"neither a price of {names} ([price] per_chip_hour) nor --delay-cost-per-day is given"
    ours = run.cluster.price.currency
    for each in _all_of_them(run, other):
        if _cost_per_day(each) > 0.0 and each.price.currency != ours:
            return (
                f"the price of {each.name} is in {each.price.currency}, that of {run.cluster.name} and "
                f"--delay-cost-per-day are in {ours}; give all of them in one currency ([price] currency)"
            )
    return None


def _all_of_them(run: WholeRun, other: WholeRun) -> list[Cluster]:
    return list({each.name: each for each in (*run.clusters, *other.clusters)}.values())


def _rule(run: WholeRun, other: WholeRun) -> dict[str, Any]:
    switch = run.asked.switch
    cost_a, cost_b = (sum(map(_cost_per_day, each.clusters)) for each in (run, other))
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
    return 24.0 * cluster.num_chips * (cluster.price.hourly or 0.0)


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
