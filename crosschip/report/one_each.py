"""For each chip and role the one report that counts, and what speaks against believing it. Pure."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from crosschip.report.documents import Document, objects
from crosschip.report.qualification import chip_title
from crosschip.report.thoroughness import thoroughness

__all__ = ["one_each"]

_LOOPBACK = re.compile(r"https?://(localhost|127(\.\d+){3}|0\.0\.0\.0|\[::1?\])(:|/|$)", re.I)


def one_each(
    reports: Mapping[str, Document],
) -> tuple[dict[tuple[str, str], tuple[str, Document]], list[str]]:
    """(chip, role) -> file and report: the most thorough one, of equals the latest; and notes on the rest.

    Where two disagree the chip counts as undecided; so does one whose report contradicts itself, and an engine at a
    loopback address whose report does not say on which machine that is, if another report has the same address.
    """
    found: dict[tuple[str, str], list[tuple[str, Document]]] = {}
    titles, notes = _titles(reports)
    for file, report in reports.items():
        believed, doubts = _believed(file, report)
        notes += doubts
        key = titles[file], report["role"]
        if _machine_unknown(report, reports):
            key = f"{titles[file]}, {file}", report["role"]
            believed = _undecided(believed)
            notes.append(
                f"{file} does not say on which machine {titles[file]} is, and another report has the same address: "
                "they are kept apart, and a pass of this one recommends nothing; examine it again with this crosschip"
            )
        found.setdefault(key, []).append((file, believed))
    chosen = {}
    for key, same in found.items():
        chosen[key], more = _of_several(key, same)
        notes += more
    return chosen, notes


def _of_several(key: tuple[str, str], same: list[tuple[str, Document]]) -> tuple[tuple[str, Document], list[str]]:
    """The most thorough one; undecided if one of them is a failure and another is none, whatever their order."""
    (file, report), *others = sorted(same, key=lambda pair: thoroughness(pair[1]), reverse=True)
    if not others:
        return (file, report), []
    times = "twice" if len(others) == 1 else f"{len(same)} times"
    note = f"{key[0]} was examined {times} to {key[1]}: {file} is used, not {', '.join(name for name, _ in others)}"
    verdicts = list(dict.fromkeys(each["verdict"] for _, each in [(file, report), *others]))
    if "FAIL" in verdicts and len(verdicts) > 1:
        note += f"; they disagree ({' and '.join(verdicts)}), so the chip counts as undecided"
        report = {**report, "verdict": "INCONCLUSIVE"}
    return (file, report), [note]


def _titles(reports: Mapping[str, Document]) -> tuple[dict[str, str], list[str]]:
    """File -> chip. A chip that could not be used gave no fingerprint: it is the one that has its device's name."""
    named: dict[str, set[str]] = {}
    for report in reports.values():
        if report.get("fingerprint"):
            named.setdefault(report["chip"], set()).add(chip_title(report))
    found = {}
    for file, report in reports.items():
        same = named.get(report["chip"], set())
        found[file] = next(iter(same)) if not report.get("fingerprint") and len(same) == 1 else chip_title(report)
    notes = [
        f"{file} names no chip; it is taken for {title}, which torch calls {reports[file]['chip']!r} as well"
        for file, title in found.items()
        if title != chip_title(reports[file])
    ]
    return found, notes


def _believed(file: str, report: Document) -> tuple[Document, list[str]]:
    """The report; one that passes and holds a failure of its own is undecided: one of the two is not true."""
    told = [*objects(report, "findings"), *objects(report, "exams")]
    failed = [str(each.get("exam", "?")) for each in told if each.get("verdict") == "FAIL"]
    if report["verdict"] not in ("PASS", "PASS WITH LIMITS") or not failed:
        return report, []
    note = (
        f"{file} says {report['verdict']} and holds a failure of its own (exam {failed[0]}): it was altered or cut, "
        "and counts as undecided; qualify again"
    )
    return _undecided(report), [note]


def _undecided(report: Document) -> Document:
    return report if report["verdict"] == "FAIL" else {**report, "verdict": "INCONCLUSIVE"}


def _machine_unknown(report: Document, reports: Mapping[str, Document]) -> bool:
    """Whether the report is of an engine on a machine that it does not name, and another has the same address."""
    engine = _engine(report)
    url = engine.get("url")
    if not isinstance(url, str) or not _LOOPBACK.match(url) or engine.get("host"):
        return False
    return sum(_engine(each).get("url") == url for each in reports.values()) > 1


def _engine(report: Document) -> dict[str, Any]:
    fingerprint = report.get("fingerprint")
    engine = fingerprint.get("engine") if isinstance(fingerprint, dict) else None
    return engine if isinstance(engine, dict) else {}
