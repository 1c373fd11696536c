"""The validation as a document: every row, every group against its threshold, every miss."""

from __future__ import annotations

import math
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from crosschip.errors import CrosschipError
from crosschip.plan.failures import PlanError
from crosschip.plan.hardware import kind_named
from crosschip.plan.known_architectures import known_architecture
from crosschip.plan.validate.cases import CannotPredict, Case, case_of
from crosschip.plan.validate.fitting import Fitted, fit_kinds, hardware_for
from crosschip.plan.validate.predicting import choose_layout, predicted_value
from crosschip.plan.validate.rows import Outcome, Row, read_rows
from crosschip.plan.validate.stops import StoppedRun, is_of_stops, stopped_run, training_shares

__all__ = ["SCHEMA_VERSION", "validate_rows"]

SCHEMA_VERSION = 1
_THRESHOLDS = Path(__file__).parent.parent / "data" / "thresholds.toml"


def validate_rows(rows: Sequence[tuple[Row, Outcome]]) -> dict[str, Any]:
    """Fit on the rows for calibration, freeze, predict all rows; the JSON document.

    A kind of chip that no row given calibrates, or none that has a layout, is fitted on the shipped ones, less those
    that are among the rows given.

    A prediction sees its own row's inputs and the fitted parameters, and no outcome.
    """
    cases: dict[str, Case] = {}
    stopped: dict[str, StoppedRun] = {}
    skipped: dict[str, str] = {}
    for row, _ in rows:
        try:
            if is_of_stops(row):
                stopped[row.id] = stopped_run(row)
            else:
                cases[row.id] = case_of(row)
        except CannotPredict as error:
            skipped[row.id] = _skipped(error)
    known = [
        (cases[row.id], outcome.value)
        for row, outcome in rows
        if row.is_calibration and row.id in cases and outcome.value is not None
    ]
    fitted = fit_kinds(known)
    shipped = _shipped_beside(set(fitted), [row for row, _ in rows])
    fitted, known = {**fitted, **fit_kinds(shipped)}, [*known, *shipped]
    shares = {case.hardware.kind: case.hardware.efficiency for case, _ in known}
    told = []
    for row, outcome in rows:
        entry: dict[str, Any] = {"id": row.id, "quantity": row.quantity, "calibration": row.is_calibration}
        entry["group"] = _group_of(row)
        if row.id in skipped:
            told.append({**entry, "skipped": skipped[row.id]})
        elif row.id in stopped:
            told.append({**entry, **_left_by_stops(stopped[row.id], outcome)})
        else:
            told.append({**entry, **_predicted(cases[row.id], outcome, fitted, shares)})
    return {
        "schema_version": SCHEMA_VERSION,
        "document": "plan validation",
        "parameters": {
            kind: {"efficiency": each.efficiency, "overlap": each.overlap, "fitted_on": list(each.rows)}
            for kind, each in fitted.items()
        },
        "groups": _judged(told),
        "rows": told,
    }


def _shipped_beside(kinds: set[str], given: Sequence[Row]) -> list[tuple[Case, float]]:
    """The shipped rows for calibration of other kinds than these, and of no run that is given: its outcome is not used
    unless the file that gives it says so."""
    found = [(case_of(row), outcome.value) for row, outcome in read_rows() if row.is_calibration]
    return [
        (case, value)
        for case, value in found
        if value is not None
        and case.hardware.kind not in kinds
        and not any(_is_same_run(case.row, row) for row in given)
    ]


def _is_same_run(row: Row, other: Row) -> bool:
    """The same id, or the same model, kind of chip and number of chips; a number that is not given may be any."""
    if row.id == other.id:
        return True
    if _plain_model(row) != _plain_model(other) or kind_named(row.chip) != kind_named(other.chip):
        return False
    return None in (row.num_chips, other.num_chips) or row.num_chips == other.num_chips


def _plain_model(row: Row) -> str:
    known = known_architecture(row.model)
    return known.name if known is not None else "".join(each for each in row.model.lower() if each.isalnum())


def _skipped(error: CrosschipError) -> str:
    return f"{error.problem}: {error.remedy}"


def _predicted(case: Case, outcome: Outcome, fitted: dict[str, Fitted], shares: dict[str, float]) -> dict[str, Any]:
    hardware = hardware_for(case, fitted, shares)
    try:
        case, layout = choose_layout(case, hardware)
    except CannotPredict as error:
        return {"skipped": _skipped(error)}
    value = predicted_value(case, layout, hardware)
    if not math.isfinite(value):
        return {"skipped": f"the prediction is {value}, no number: mend the row's sizes"}
    notes = [*case.notes, *([outcome.note] if outcome.note else [])]
    if hardware.kind not in fitted:
        of_it = "what others reach of theirs" if fitted else "0.85, assumed"
        notes.append(f"no row calibrates {hardware.kind}: its product share times {of_it}")
    return _compared(value, outcome, str(layout), case.num_chips, notes)


def _left_by_stops(run: StoppedRun, outcome: Outcome) -> dict[str, Any]:
    try:
        low, middle, high = training_shares(run)
    except PlanError as error:
        return {"skipped": _skipped(error)}
    notes = [*run.notes, f"P10 to P90: {low:.1f} to {high:.1f} %", *([outcome.note] if outcome.note else [])]
    return _compared(middle, outcome, "-", run.num_chips, notes)


def _compared(value: float, outcome: Outcome, layout: str, num_chips: int, notes: list[str]) -> dict[str, Any]:
    return {
        "predicted": value,
        "published": outcome.value,
        "error": None if outcome.value is None else value / outcome.value - 1,
        "layout": layout,
        "num_chips": num_chips,
        "notes": notes,
    }


def _thresholds() -> list[dict[str, Any]]:
    return list(tomllib.loads(_THRESHOLDS.read_text(encoding="utf-8"))["group"])


def _group_of(row: Row) -> str:
    cells = {"quantity": row.quantity, "kind": row.kind, "arch": "moe" if row.is_moe else "dense"}
    for group in _thresholds():
        if all(cells[key] == group[key] for key in cells if key in group) and group.get("source", "") in row.source:
            return str(group["name"])
    raise AssertionError("the last group takes every row")


def _judged(told: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each group's errors over rows that were not fitted on."""
    judged = []
    for group in _thresholds():
        mine = [each for each in told if each["group"] == group["name"] and not each["calibration"]]
        errors = sorted((abs(each["error"]), each["id"]) for each in mine if each.get("error") is not None)
        if not errors:
            continue
        mean = sum(error for error, _ in errors) / len(errors)
        most = group.get("most")
        judged.append(
            {
                "name": group["name"],
                "num_rows": len(errors),
                "mean_error": mean,
                "median_error": errors[len(errors) // 2][0],
                "worst_error": errors[-1][0],
                "worst_row": errors[-1][1],
                "threshold": most,
                "met": None if most is None else mean <= most,
                "misses": [] if most is None else [row for error, row in errors if error > most],
            }
        )
    return judged
