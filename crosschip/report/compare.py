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

import re
from collections.abc import Mapping, Sequence
from typing import Any

from crosschip import __version__
from crosschip.published import FIGURES, published_chip
from crosschip.report.comparable import refuse_incomparable
from crosschip.report.documents import Document, is_number, objects
from crosschip.report.grounds import Candidate, Recommendation, recommend
from crosschip.report.qualification import chip_title, measurements
from crosschip.report.thoroughness import shortfall, thoroughness

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
    chosen, more_notes = _one_each(reports)
    chips: dict[str, Document] = {}
    by_fingerprint = sorted(chosen.items(), key=lambda item: not item[1][1].get("fingerprint"))
    for (title, role), (file, report) in by_fingerprint:
        chip = chips.setdefault(title, _chip(title, report))
        chip["roles"][role] = _role(file, report)
        chip["measured"] += _measured(report)
    first = next(iter(reports.values()))
    subject = str(next((each["subject"] for each in reports.values() if each.get("compute_dtype")), first["subject"]))
    more_notes += [note for plan in plans for note in _add_plan(chips, plan, subject)]
    answers = {role: recommend(role, _candidates(chips, role)) for role in ROLES}
    titles = list(chips)
    return {
        "schema_version": SCHEMA_VERSION,
        "document": "comparison",
        "crosschip": __version__,
        "subject": subject,
        "chips": [chips[title] for title in titles],
        "recommendations": {role: answer.document() for role, answer in answers.items()},
        "summary": _summary(answers),
        "notes": notes + more_notes,
    }


def _one_each(
    reports: Mapping[str, Document],
) -> tuple[dict[tuple[str, str], tuple[str, Document]], list[str]]:
    """For each chip and role the most thorough report, of equals the latest; a disagreement makes it open."""
    chosen: dict[tuple[str, str], tuple[str, Document]] = {}
    notes: list[str] = []
    titles = _titles(reports)
    notes += [
        f"{file} names no chip; it is taken for {title}, which torch calls {reports[file]['chip']!r} as well"
        for file, title in titles.items()
        if title != chip_title(reports[file])
    ]
    for file, report in reports.items():
        key = titles[file], report["role"]
        if key not in chosen:
            chosen[key] = file, report
            continue
        before = chosen[key]
        kept, other = sorted((before, (file, report)), key=lambda pair: thoroughness(pair[1]), reverse=True)
        verdicts = {kept[1]["verdict"], other[1]["verdict"]}
        note = f"{key[0]} was examined twice to {key[1]}: {kept[0]} is used, not {other[0]}"
        if "FAIL" in verdicts and len(verdicts) > 1:
            note += f"; they disagree ({kept[1]['verdict']} and {other[1]['verdict']}), so the chip counts as undecided"
            kept = kept[0], {**kept[1], "verdict": "INCONCLUSIVE"}
        notes.append(note)
        chosen[key] = kept
    return chosen, notes


def _titles(reports: Mapping[str, Document]) -> dict[str, str]:
    """File -> chip. A chip that could not be used gave no fingerprint: it is the one that has its device's name."""
    named: dict[str, set[str]] = {}
    for report in reports.values():
        if report.get("fingerprint"):
            named.setdefault(report["chip"], set()).add(chip_title(report))
    found = {}
    for file, report in reports.items():
        same = named.get(report["chip"], set())
        found[file] = next(iter(same)) if not report.get("fingerprint") and len(same) == 1 else chip_title(report)
    return found


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


def _add_plan(chips: dict[str, Document], plan: Document, subject: str) -> list[str]:
    """Put a plan to its chip; a note where it cannot be: a plan for a chip that has no report is no evidence here."""
    ready, name = plan.get("ready"), f"the plan of {plan.get('model', '?')} on {plan.get('cluster', plan.get('chip'))}"
    if not isinstance(ready, dict) or not all(isinstance(ready.get(key), str) for key in ("p50", "p90")):
        return [f"{name} has no dates under `ready`; make it again with this crosschip"]
    if plan.get("model", subject) != subject:
        return [f"{name} is left out: the reports are of {subject}"]
    role = str(plan.get("role", "train"))
    mine = [chip for chip in chips.values() if _is_planned(chip, plan)]
    if not mine:
        return [f"{name} is for {plan.get('chip')}, of which there is no report: it is left out"]
    notes = []
    for chip in mine:
        if role in chip["plans"]:
            notes.append(f"{chip['title']} has two plans; {name} is used")
        chip["plans"][role] = {"p50": ready["p50"], "p90": ready["p90"], "cluster": plan.get("cluster")}
    return notes


def _is_planned(chip: Document, plan: Document) -> bool:
    """A plan names its chip as torch does, by its title, or by expressions for what the chip calls itself."""
    names = [str(chip[key]) for key in ("chip", "title", "model_name") if chip[key]]
    if plan.get("chip") in names:
        return True
    expressions = plan.get("chip_matches")
    if not isinstance(expressions, list):
        return False
    try:
        return any(re.search(each, name, re.I) for each in expressions if isinstance(each, str) for name in names)
    except (re.error, OverflowError, RecursionError):  # of no use, like a name that fits nothing
        return False


def _candidates(chips: Mapping[str, Document], role: str) -> list[Candidate]:
    found = []
    for title, chip in chips.items():
        mine = chip["roles"].get(role)
        if mine is None:
            continue
        figures = {row["key"]: row["value"] for row in (chip["published"] or {}).get("figures", ())}
        plan = chip["plans"].get(role, {})
        dates = (plan["p50"], plan["p90"]) if plan.get("p50") and plan.get("p90") else None
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
