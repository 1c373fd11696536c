"""Two parameters a kind of chip, fitted on the rows that are for calibration and on nothing else.

Efficiency (what a large product reaches of the datasheet) and overlap (the share of collectives that hides). A kind
is what a row calls its chip. One row fixes only the first; with more, the second is held near what is usual, so that
it does not stand in for other causes. A kind without such rows takes the mean of other names of the same chip; else
the datasheet's share that its largest product was measured at, times what the fitted kinds reach of theirs on average.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from scipy.optimize import minimize_scalar

from crosschip.plan.hardware import Hardware, with_rates
from crosschip.plan.step import Layout
from crosschip.plan.validate.cases import Case
from crosschip.plan.validate.predicting import choose_layout, predicted_value

__all__ = ["Fitted", "fit_kinds", "hardware_for"]

_OVERLAPS = [each / 10 for each in range(11)]
_DEFAULT_OVERLAP = 0.8
_OVERLAP_SPREAD, _NOISE = 0.2, 0.05  # standard deviations: of overlap between trainers, and of a published figure
_LEAST, _MOST = 0.1, 1.0
_ROUNDS = 3


@dataclass(frozen=True)
class Fitted:
    """A kind's parameters and the ids of the rows they were fitted on."""

    chip: str
    efficiency: float
    overlap: float
    rows: tuple[str, ...]


Known = tuple[Case, float]  # a case for calibration, with its published value


def _misfit(known: Sequence[tuple[Case, Layout, float]], hardware: Hardware) -> float:
    return sum(math.log(predicted_value(case, layout, hardware) / value) ** 2 for case, layout, value in known)


def _best(known: Sequence[tuple[Case, Layout, float]], hardware: Hardware) -> Hardware:
    overlaps = _OVERLAPS if len(known) > 1 else [_DEFAULT_OVERLAP]
    found = []
    for overlap in overlaps:
        fitted = minimize_scalar(
            lambda each, overlap=overlap: _misfit(known, with_rates(hardware, float(each), overlap)),
            bounds=(_LEAST, _MOST), method="bounded", options={"xatol": 1e-4},
        )  # fmt: skip
        unusual = (_NOISE * (overlap - _DEFAULT_OVERLAP) / _OVERLAP_SPREAD) ** 2 if len(known) > 1 else 0.0
        found.append((float(fitted.fun) + unusual, float(fitted.x), overlap))
    _, efficiency, overlap = min(found)
    return with_rates(hardware, efficiency, overlap)


def fit_kinds(known: Sequence[Known]) -> dict[str, Fitted]:
    """Fit every kind that has rows; layouts that rows leave open are searched for again after each round."""
    by_kind: dict[str, list[Known]] = {}
    for case, value in known:
        by_kind.setdefault(case.row.chip, []).append((case, value))
    fitted = {}
    for kind, rows in by_kind.items():
        hardware = with_rates(rows[0][0].hardware, rows[0][0].hardware.efficiency * 0.85, _DEFAULT_OVERLAP)
        for _ in range(_ROUNDS):
            laid_out = [(*choose_layout(case, hardware), value) for case, value in rows]
            before, hardware = hardware, _best(laid_out, hardware)
            if before.overlap == hardware.overlap and abs(before.efficiency - hardware.efficiency) < 1e-3:
                break
        ids = tuple(case.row.id for case, _ in rows)
        fitted[kind] = Fitted(hardware.kind, hardware.efficiency, hardware.overlap, ids)
    return fitted


def hardware_for(case: Case, fitted: Mapping[str, Fitted], shares: Mapping[str, float]) -> Hardware:
    """A case's chip with its kind's parameters; `shares` are the largest products' shares of the fitted chips."""
    hardware = case.hardware
    if (own := fitted.get(case.row.chip)) is not None:
        return with_rates(hardware, own.efficiency, own.overlap)
    if not fitted:
        return with_rates(hardware, hardware.efficiency * 0.85, _DEFAULT_OVERLAP)
    same = [each for each in fitted.values() if each.chip == hardware.kind]
    near = same or list(fitted.values())
    reached = [each.efficiency / shares[each.chip] for each in near]
    overlap = sum(each.overlap for each in near) / len(near)
    return with_rates(hardware, min(1.0, hardware.efficiency * sum(reached) / len(reached)), overlap)
