"""Chips side by side for one model: which for training, which for inference, and on what grounds. Pure: no files.

The rule, for each role: only a chip that passed a complete qualification, with all exams, can be recommended. Of
several, the one is recommended that is measurably faster, or that finishes earlier by its plan; where neither was
measured the answer is INCONCLUSIVE, with what the published figures would suggest beside it. A published figure never
decides.

A measured speed is an entry `kind="speed"`, `what`, `value`, `unit`, with the bounds `lower` and `upper`; larger is
better. Two chips are told apart by it only where the bounds do not overlap. A plan is a document `document="plan"`
with `chip`, `chip_matches` (regular expressions for the chip's names), `role`, and `ready`:
`{"p50": "YYYY-MM-DD", "p90": "YYYY-MM-DD"}`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from crosschip import __version__
from crosschip.published import FIGURES, published_chip
from crosschip.report.comparable import least_named, refuse_incomparable
from crosschip.report.documents import Document, is_number, objects
from crosschip.report.grounds import Candidate, Recommendation, recommend
from crosschip.report.one_each import one_each
from crosschip.report.planned import add_plans
from crosschip.report.qualification import measurements
from crosschip.report.thoroughness import shortfall

__all__ = ["compare"]

SCHEMA_VERSION = 1
ROLES = ("train", "serve")
_NUM_FINDINGS = 3


def compare(reports: Mapping[str, Document], plans: Sequence[Document] = ()) -> Document:
    """Compare reports of one model; `reports` is by file name, which errors name.

    Raises:
        ReportError: fewer than two reports, one that is none or too new, or reports of different subjects.
    """
    notes = refuse_incomparable(reports)
    chosen, more_notes = one_each(reports)
    chips: dict[str, Document] = {}
    by_fingerprint = sorted(chosen.items(), key=lambda item: not item[1][1].get("fingerprint"))
    for (title, role), (file, report) in by_fingerprint:
        chip = chips.setdefault(title, _chip(title, report))
        chip["roles"][role] = _role(file, report)
        chip["measured"] += _measured(report)
    subject = str(min(reports.values(), key=least_named)["subject"])
    plan_notes, unlike = add_plans(chips, plans, subject)
    answers = {role: recommend(role, _candidates(chips, role, by_date=role not in unlike)) for role in ROLES}
    titles = list(chips)
    return {
        "schema_version": SCHEMA_VERSION,
        "document": "comparison",
        "crosschip": __version__,
        "subject": subject,
        "chips": [chips[title] for title in titles],
        "recommendations": {role: answer.document() for role, answer in answers.items()},
        "summary": _summary(answers),
        "notes": notes + more_notes + plan_notes,
    }


def _chip(title: str, report: Document) -> Document:
    fingerprint = report.get("fingerprint")
    known = fingerprint.get("chip") if isinstance(fingerprint, dict) else None
    known = known if isinstance(known, dict) else {}
    measured = []
    if is_number(known.get("memory_bytes")):
        measured.append({"what": "memory", "value": known["memory_bytes"] / 1e9, "unit": "GB"})
    if isinstance(known.get("dtypes"), dict):
        computes = [dtype for dtype, how in known["dtypes"].items() if how == "computes"]
        measured.append({"what": "dtypes that compute", "value": ", ".join(computes) or "none", "unit": ""})
    model_name = known.get("model_name")
    return {
        "title": title,
        "chip": report["chip"],
        "vendor": known.get("vendor"),
        "model_name": model_name,
        "is_simulated": str(report["chip"]).partition(":")[0] == "sim",
        "roles": {},
        "measured": measured,
        "published": _published(model_name),
        "plans": {},
    }


def _published(model_name: Any) -> Document | None:
    chip = published_chip(model_name) if isinstance(model_name, str) else None
    if chip is None:
        return None
    return {
        "name": chip.name,
        "note": chip.note,
        "figures": [
            {"key": key, "what": FIGURES[key], "text": each.text, "confirmed": each.confirmed, "value": each.value}
            for key, each in chip.figures.items()
        ],
    }


def _role(file: str, report: Document) -> Document:
    findings = objects(report, "findings")
    exams = objects(report, "exams")
    dtype = report.get("compute_dtype")
    partial, to_complete = shortfall(report)
    return {
        "file": file,
        "verdict": report["verdict"],
        "complete": report.get("complete") is True,
        "partial": partial,
        "to_complete": to_complete,
        "tier": str(report.get("tier", "?")),
        "compute_dtype": str(dtype) if dtype else None,
        "began": str(report.get("began", "")),
        "num_findings": {
            verdict: sum(each.get("verdict") == verdict for each in findings)
            for verdict in ("FAIL", "INCONCLUSIVE", "PASS WITH LIMITS")
        },
        "worst": [
            {key: str(each.get(key) or "") for key in ("verdict", "subject", "message")}
            for each in findings[:_NUM_FINDINGS]
        ],
        "exams": {str(exam.get("exam", "?")): str(exam.get("verdict", "?")) for exam in exams},
        "not_ended": {
            str(exam.get("exam", "?")): str(exam.get("ended", "?")) for exam in exams if exam.get("ended") != "complete"
        },
        "speeds": [entry for _, entry in measurements(report) if _is_speed(entry)],
    }


def _is_speed(entry: Document) -> bool:
    return entry.get("kind") == "speed" and all(is_number(entry.get(key)) for key in ("lower", "value", "upper"))


def _measured(report: Document) -> list[Document]:
    """What was measured in this role, a few numbers that people compare."""
    role, found = report["role"], []
    ratios = [entry["ratio"] for _, entry in measurements(report) if is_number(entry.get("ratio"))]
    if ratios:
        found.append({"what": "largest error ratio (limit 2.5)", "value": max(ratios), "unit": "", "role": role})
    for _, entry in measurements(report):
        if entry.get("what") == "speed" and is_number(entry.get("launch_s")):
            found.append(
                {"what": "time of the smallest call", "value": entry["launch_s"] * 1e6, "unit": "µs", "role": role}
            )
        elif _is_speed(entry):
            found.append(
                {"what": entry.get("what"), "value": entry["value"], "unit": entry.get("unit", ""), "role": role}
            )
        elif entry.get("kind") == "product rate" and is_number(entry.get("flop_per_s")):
            what = f"products in {entry.get('dtype', '?')}, {entry.get('of', '?')}"
            found.append({"what": what, "value": entry["flop_per_s"] / 1e12, "unit": "TFLOP/s", "role": role})
        elif entry.get("kind") == "memory rate" and is_number(entry.get("bytes_per_s")):
            what = f"copies in {entry.get('dtype', '?')}"
            found.append({"what": what, "value": entry["bytes_per_s"] / 1e9, "unit": "GB/s", "role": role})
        elif entry.get("plot") == "bandwidth" and is_number(entry.get("bandwidth_gb_s")):
            what = f"{entry.get('collective', '?')}, bandwidth"
            found.append({"what": what, "value": entry["bandwidth_gb_s"], "unit": "GB/s", "role": role})
        elif entry.get("kind") == "equivalence" and is_number(entry.get("mean")):
            what = "final loss against the CPU"
            found.append({"what": what, "value": 100 * entry["mean"], "unit": "%", "role": role})
    return found


def _candidates(chips: Mapping[str, Document], role: str, *, by_date: bool) -> list[Candidate]:
    found = []
    for title, chip in chips.items():
        mine = chip["roles"].get(role)
        if mine is None:
            continue
        figures = {row["key"]: row["value"] for row in (chip["published"] or {}).get("figures", ())}
        plan = chip["plans"].get(role, {})
        dates = (plan["p50"], plan["p90"]) if plan and by_date else None
        found.append(
            Candidate(
                title=title,
                verdict=mine["verdict"],
                complete=mine["complete"],
                tier=mine["tier"],
                worst=tuple(
                    f"{each['subject']}: {each['message']}" for each in mine["worst"] if each["verdict"] == "FAIL"
                ),
                speeds=_speeds(mine),
                ready=dates,
                published=figures,
                is_simulated=chip["is_simulated"],
                partial=mine["partial"],
                to_complete=mine["to_complete"],
            )
        )
    return found


def _speeds(role: Document) -> dict[str, tuple[float, float, float, str]]:
    """By name: (lower, value, upper, unit)."""
    return {
        str(each.get("what")): (
            float(each["lower"]),
            float(each["value"]),
            float(each["upper"]),
            _unit_of_work(each, role),
        )
        for each in role["speeds"]
    }


def _unit_of_work(speed: Mapping[str, Any], role: Document) -> str:
    """Speeds in another dtype are of other work: they are told apart by their unit."""
    dtype = role["compute_dtype"]
    return f"{speed.get('unit')}" + (f" in {dtype}" if dtype else "")


def _summary(answers: Mapping[str, Recommendation]) -> str:
    words = {"train": "Training", "serve": "inference"}
    text = "; ".join(f"{words[role]}: {answers[role].chip or answers[role].answer}" for role in ROLES)
    train, serve = (answers[role].chip for role in ROLES)
    if train and serve and train != serve:
        text += ". What one trains crosses to the other by a handoff, whose certificate says that it is the same model"
    return text
