"""What failures do to one job: time between stops, the interval of saving, goodput by cause, spares, corruption."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from crosschip.plan.failures.corruption import expected_corruption
from crosschip.plan.failures.interval import best_interval, expected_goodput, young_interval
from crosschip.plan.failures.problem import at_least
from crosschip.plan.failures.published import facts
from crosschip.plan.failures.rates import FailureRates
from crosschip.plan.failures.recovery import Recovery, recovery_figures, save_time
from crosschip.plan.failures.simulation import Ledger
from crosschip.plan.failures.spares import share_waiting, spares_needed
from crosschip.plan.figures import Figure

__all__ = ["Outlook", "failure_outlook", "outlook_document", "rate_figures", "usual_recovery"]

_CURVE_POINTS = 41
_NUM_DRAWS = 20_000
_CURVE_SPAN = 30.0  # the curve reaches from a thirtieth of the chosen interval to thirty times it


@dataclass(frozen=True)
class Outlook:
    """Goodput of a job against the interval of saving, closed form at the median rate; times in seconds."""

    num_chips: int
    between_stops_h: tuple[float, float, float]  # P10, P50, P90 of the mean time between stops
    young_s: float
    curve: tuple[tuple[float, float], ...]  # (interval in s, expected goodput)
    recovery: Recovery
    swaps_per_day: float


def usual_recovery(
    rates: FailureRates,
    num_chips: int,
    chips_per_host: int,
    *,
    save_bytes: float | None = None,
    store_gb_s: float | None = None,
    blocking: bool = False,
    num_spares: int | None = None,
    num_groups: int = 1,
    **given: float,
) -> Recovery:
    """The shipped figures, `given` ones in their place, with the best interval and the spares that hardly ever run out.

    With the checkpoint's bytes and the store's bandwidth the save takes what these say: `blocking` keeps the chips
    waiting for all of it, else they wait as long as published for an asynchronous save and the rest is its lag.
    """
    at_least("num_chips", num_chips, 1)
    draft = Recovery(interval_s=1e9, num_groups=num_groups, chips_per_host=chips_per_host, **given)  # type: ignore[arg-type]
    save, lag = draft.save_blocking_s, draft.save_lag_s
    if save_bytes is not None and store_gb_s is not None:
        whole = save_time(save_bytes, store_gb_s)
        save, lag = (whole, 0.0) if blocking else (min(save, whole), max(0.0, whole - save))
    between_s = rates.hours_between_stops(num_chips)[1] * 3600
    interval = best_interval(save, between_s, least_s=max(lag, 60.0 if save == 0 else save))
    if num_spares is None:
        swaps = draft.swap_share * float(np.quantile(_chip_rates(rates), 0.9)) * num_chips
        num_spares = spares_needed(swaps, draft.repair_s / 86400)
    return replace(draft, interval_s=interval, save_blocking_s=save, save_lag_s=lag, num_spares=num_spares)


def _chip_rates(rates: FailureRates) -> NDArray[np.float64]:
    """Draws of a chip's stops a day, with what was seen."""
    return rates.sample(_NUM_DRAWS, 0).chip_per_day


def failure_outlook(rates: FailureRates, num_chips: int, recovery: Recovery) -> Outlook:
    """The outlook of a job of `num_chips` with this recovery."""
    between = rates.hours_between_stops(num_chips)
    between_s = between[1] * 3600
    stop_s = recovery.mean_stop_s / recovery.num_groups
    points = recovery.interval_s * np.geomspace(1 / _CURVE_SPAN, _CURVE_SPAN, _CURVE_POINTS)
    # What a stop loses beyond the interval itself: the newest save, where it is not on disk yet.
    curve = tuple(
        (float(each), expected_goodput(float(each), recovery.save_blocking_s, stop_s + recovery.save_lag_s, between_s))
        for each in points
        if each >= recovery.save_lag_s
    )
    swaps = recovery.swap_share * float(_chip_rates(rates).mean()) * num_chips
    return Outlook(num_chips, between, young_interval(recovery.save_blocking_s, between_s), curve, recovery, swaps)


def outlook_document(outlook: Outlook, rates: FailureRates, ledger: Ledger, days: float) -> dict[str, Any]:
    """The outlook and what the simulation gave, for the plan's JSON."""
    recovery = outlook.recovery
    wall = float(ledger.wall_s.sum()) or 1.0
    shares = {
        name: float(getattr(ledger, f"{name}_s").sum()) / wall
        for name in ("useful", "lost", "restart", "saving", "idle")
    }
    corruption = expected_corruption(rates.corruption_per_day, outlook.num_chips, days, recovery.corruption_caught)
    low, middle, high = (float(each) for each in np.quantile(ledger.goodput, (0.1, 0.5, 0.9)))
    return {
        "num_chips": outlook.num_chips,
        "between_stops_h": dict(zip(("p10", "p50", "p90"), outlook.between_stops_h, strict=True)),
        "stops": {"mean": float(ledger.num_stops.mean())},
        "goodput": {"p10": low, "p50": middle, "p90": high},
        "time_shares": shares,
        "interval": {
            "chosen_s": recovery.interval_s,
            "young_s": outlook.young_s,
            "curve": [list(point) for point in outlook.curve],
        },
        "spares": {
            "nodes": recovery.num_spares,
            "chips_per_node": recovery.chips_per_host,
            "share_waiting": share_waiting(recovery.num_spares, outlook.swaps_per_day, recovery.repair_s / 86400),
        },
        "corruption": {
            "expected": corruption.expected,
            "unnoticed": corruption.expected_unnoticed,
            "chance_unnoticed": corruption.chance_unnoticed,
            "words": corruption.words(),
        },
        "figures": {
            name: figure.document() for name, figure in (rate_figures(rates) | recovery_figures(recovery)).items()
        },
    }


def rate_figures(rates: FailureRates) -> dict[str, Figure]:
    """The priors of the rates, each with the fleets or the soak that it comes from."""
    found = {}
    named = (
        ("job rate", rates.job_per_day),
        ("chip rate", rates.chip_per_day),
        ("corruption rate", rates.corruption_per_day),
    )
    for use, rate in named:
        rows = facts(use)
        systems = ", ".join(row.system for row in rows)
        low, high = rate.quantile(0.1), rate.quantile(0.9)
        source = f"mean of {systems}, with what a soak adds; P10 {low:.2g}, P90 {high:.2g}"
        found[use] = Figure(rate.mean, rows[0].unit, "published", source)
    for number, each in enumerate(rates.seen):
        source = f"{each.num_stops} stops on {each.num_chips} chips in {each.days:g} days"
        found[f"seen {number + 1}"] = Figure(each.num_stops / each.days, "stops/job-day", "measured", source)
    return found
