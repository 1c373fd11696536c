"""What a plan costs: chip-hours, energy where it is given, the price of both."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from crosschip.plan.dates.schedule import Schedule, StageDates
from crosschip.plan.failures.problem import PlanError, at_least

__all__ = ["Bill", "Prices", "bill"]


@dataclass(frozen=True)
class Prices:
    """Prices in one currency; what is None is not counted, and the bill says so. `chip_kw` holds host and cooling."""

    currency: str = "USD"
    per_chip_hour: float | None = None
    chip_kw: float | None = None
    per_kwh: float | None = None

    def __post_init__(self) -> None:
        for name in ("per_chip_hour", "chip_kw", "per_kwh"):
            if getattr(self, name) is not None:
                at_least(name, getattr(self, name), 0.0)
        if self.per_kwh is not None and self.chip_kw is None:
            raise PlanError("energy has a price and the chip no power", "give chip_kw as well")


@dataclass(frozen=True)
class Bill:
    """P10, P50 and P90 of chip-hours (paid spares included), energy in MWh and money; None where nothing was given."""

    chip_hours: tuple[float, float, float]
    energy_mwh: tuple[float, float, float] | None
    money: tuple[float, float, float] | None
    currency: str
    left_out: tuple[str, ...]


def bill(schedule: Schedule, prices: Prices | dict[str, Prices]) -> Bill:
    """The bill of all stages; `prices` may differ by chip (train on one, serve or reinforce on another).

    Raises:
        PlanError: a stage's chip has no prices, or two chips are priced in two currencies.
    """
    hours, energy, money = np.zeros((3, schedule.scenario.num_trials))
    left_out, shares = [], [share for each in schedule.stages for share in _shares(each, prices)]
    currencies = {price.currency for _, price, _ in shares}
    if len(currencies) > 1:
        raise PlanError(f"the prices are in {', '.join(sorted(currencies))}", "give all prices in one currency")
    for what, price, share_hours in shares:
        hours += share_hours
        if price.per_chip_hour is None and price.per_kwh is None:
            left_out.append(f"{what}: no price is given")
        if price.chip_kw is None:
            left_out.append(f"{what}: the chip's power is not given, so energy is not counted")
        kwh = share_hours * (price.chip_kw or 0.0)
        energy += kwh / 1000
        money += share_hours * (price.per_chip_hour or 0.0) + kwh * (price.per_kwh or 0.0)
    left_out += [
        f"{stage.name}: {stage.unpaid_spares} chips of spare hosts beyond the cluster, on which the dates count; give "
        "[recovery] num_spares to have them in"
        for stage in (each.stage for each in schedule.stages)
        if stage.unpaid_spares
    ]
    return Bill(
        _quantiles(hours),
        _quantiles(energy) if energy.any() else None,
        _quantiles(money) if money.any() else None,
        currencies.pop() if currencies else Prices().currency,
        tuple(left_out),
    )


def _shares(
    dates: StageDates, prices: Prices | dict[str, Prices]
) -> list[tuple[str, Prices, np.typing.NDArray[np.float64]]]:
    """(stage and chip, prices, chip-hours) of each kind of chip in a stage; spares are of its main kind."""
    stage, spare_hours = dates.stage, dates.ledger.wall_s / 3600 * dates.stage.spare_chips
    found = []
    for place, (chip, number) in enumerate(stage.chips):
        spares = spare_hours if place == 0 else 0.0
        if number or (place == 0 and stage.spare_chips):
            what = stage.name if place == 0 else f"{stage.name} on {chip}"
            hours = dates.chip_hours * (number / max(1, stage.num_chips)) + spares
            found.append((what, _prices_of(chip, prices), hours))
    return found


def _prices_of(chip: str, prices: Prices | dict[str, Prices]) -> Prices:
    if isinstance(prices, Prices):
        return prices
    if chip not in prices and chip:
        raise PlanError(
            f"the chip {chip!r} has no prices", f"give prices for it, as for {', '.join(prices) or 'others'}"
        )
    return prices.get(chip) or next(iter(prices.values()), Prices())


def _quantiles(values: np.typing.NDArray[np.float64]) -> tuple[float, float, float]:
    low, middle, high = (float(each) for each in np.quantile(values, (0.1, 0.5, 0.9)))
    return low, middle, high
