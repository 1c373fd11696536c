"""Two parameters a kind of chip, fitted on the rows that are for calibration and on nothing else.

Efficiency (what a large product reaches of the datasheet) and overlap (the share of collectives that hides). A kind
is an entry of data/chips.toml, however a row spells it. A row that does not say its layout, batch, length or number of
chips counts less: what stands in for them moves a prediction too. One row fixes only the efficiency; with more, the
overlap is held near what is usual, so that it does not stand in for other causes. A kind without rows takes the
datasheet's share that its largest product was measured at, times what the fitted kinds reach of theirs on average.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from scipy.optimize import minimize_scalar

from crosschip.plan.hardware import Hardware, with_rates
from crosschip.plan.step import Layout
from crosschip.plan.validate.cases import CannotPredict, Case
from crosschip.plan.validate.predicting import choose_layout, predicted_value

__all__ = ["Fitted", "fit_kinds", "hardware_for"]

_OVERLAPS = [each / 10 for each in range(11)]
_DEFAULT_OVERLAP = 0.8
_OVERLAP_SPREAD, _NOISE = 0.2, 0.05  # standard deviations: of overlap between trainers, and of a published figure
_ASSUMED_NOISE = 0.15  # of a figure whose run is not fully described
_LEAST, _MOST = 0.1, 1.0
_ROUNDS = 3


@dataclass(frozen=True)
class Fitted:
    """A kind's parameters and the ids of the rows they were fitted on."""

    efficiency: float
    overlap: float
    rows: tuple[str, ...]


Known = tuple[Case, float]  # a case for calibration, with its published value


def _misfit(known: Sequence[tuple[Case, Layout, float]], hardware: Hardware) -> float:
    """Squared errors in units of their noise."""
    return sum(
        (math.log(predicted_value(case, layout, hardware) / value) / (_NOISE if case.is_described else _ASSUMED_NOISE))
        ** 2
        for case, layout, value in known
    )


def _best(known: Sequence[tuple[Case, Layout, float]], hardware: Hardware) -> Hardware:
    overlaps = _OVERLAPS if len(known) > 1 else [_DEFAULT_OVERLAP]
    found = []
    for overlap in overlaps:
        fitted = minimize_scalar(
            lambda each, overlap=overlap: _misfit(known, with_rates(hardware, float(each), overlap)),
            bounds=(_LEAST, _MOST), method="bounded", options={"xatol": 1e-4},
        )  # fmt: skip
        unusual = ((overlap - _DEFAULT_OVERLAP) / _OVERLAP_SPREAD) ** 2
        found.append((float(fitted.fun) + unusual, float(fitted.x), overlap))
    _, efficiency, overlap = min(found)
    return with_rates(hardware, efficiency, overlap)


def _laid_out(rows: Sequence[Known], hardware: Hardware) -> list[tuple[Case, Layout, float]]:
    """Rows in their layouts, less those that have none."""
    found = []
    for case, value in rows:
        try:
            found.append((*choose_layout(case, hardware), value))
        except CannotPredict:
            continue
    return found


def fit_kinds(known: Sequence[Known]) -> dict[str, Fitted]:
    """Fit every kind that has rows; layouts that rows leave open are searched for again after each round."""
    by_kind: dict[str, list[Known]] = {}
    for case, value in known:
        by_kind.setdefault(case.hardware.kind, []).append((case, value))
    fitted = {}
    for kind, rows in by_kind.items():
        hardware = with_rates(rows[0][0].hardware, rows[0][0].hardware.efficiency * 0.85, _DEFAULT_OVERLAP)
        for _ in range(_ROUNDS):
            laid_out = _laid_out(rows, hardware)
            if not laid_out:
                break
            before, hardware = hardware, _best(laid_out, hardware)
            if before.overlap == hardware.overlap and abs(before.efficiency - hardware.efficiency) < 1e-3:
                break
        if laid_out:
            ids = tuple(case.row.id for case, _, _ in laid_out)
            fitted[kind] = Fitted(hardware.efficiency, hardware.overlap, ids)
    return fitted


def hardware_for(case: Case, fitted: Mapping[str, Fitted], shares: Mapping[str, float]) -> Hardware:
    """A case's chip with its kind's parameters; `shares` are the largest products' shares of the fitted chips."""
    hardware = case.hardware
    if (own := fitted.get(hardware.kind)) is not None:
        return with_rates(hardware, own.efficiency, own.overlap)
    if not fitted:
        return with_rates(hardware, hardware.efficiency * 0.85, _DEFAULT_OVERLAP)
    reached = [each.efficiency / shares[kind] for kind, each in fitted.items()]
    overlap = sum(each.overlap for each in fitted.values()) / len(fitted)
    return with_rates(hardware, min(1.0, hardware.efficiency * sum(reached) / len(reached)), overlap)
