"""The report of a qualification as one HTML page: the verdict, what is wrong, plots of what was measured, what is open.

What an exam measured is drawn where a drawing is known (`measured_figures` has the convention) and shown as a table
where none is. A report that is interrupted, or of a chip that was not there, has a page, too.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from crosschip.errors import CrosschipError
from crosschip.report.documents import Document, is_number, objects
from crosschip.report.figures import count, duration
from crosschip.report.measured_figures import measured_figures
from crosschip.report.qualification import checked_report, chip_title, measurements, read_report, shown
from crosschip.report.templating import render
from crosschip.rundir import write_text

__all__ = ["page_beside", "qualification_page", "write_qualification_page"]

_STATES = {"PASS": "good", "PASS WITH LIMITS": "open", "INCONCLUSIVE": "open", "FAIL": "bad"}
_MOST_ROWS = 40
_MOST_FINDINGS = 60
_ROLES = {"train": "train", "serve": "serve"}


def qualification_page(report: dict[str, Any]) -> str:
    """The page of a report document, as text.

    Raises:
        ReportError: the document is no qualification report, or a newer crosschip wrote it.
    """
    checked_report(report, "the report")
    found = measured_figures(measurements(report))
    findings = objects(report, "findings")
    exams = objects(report, "exams")
    return render(
        "qualification.html",
        {
            "title": f"{chip_title(report)} to {_ROLES[report['role']]} {report['subject']}",
            "verdict": str(report["verdict"]),
            "state": _STATES[report["verdict"]],
            "complete": report.get("complete") is True,
            "tiles": _tiles(report, findings, exams),
            "findings": [_finding(each) for each in findings[:_MOST_FINDINGS]],
            "findings_left_out": max(0, len(findings) - _MOST_FINDINGS),
            "exams": [_exam_row(each, findings) for each in exams],
            "figures": found.figures,
            "notes": found.notes,
            "tables": _tables(found.rest),
            "not_covered": _not_covered(exams),
            "fingerprint": flat(report.get("fingerprint")),
            "about": _about(report),
            "operators": _operators(report.get("trace")),
        },
        styles=("style.css", "qualification.css"),
    )


def write_qualification_page(report: Path) -> Path | None:
    """Write the page of the report in a JSON file beside it; None when there is no report, as after bad usage.

    Raises:
        ReportError: the file holds no report.
    """
    if not report.exists():
        return None
    page = report.with_suffix(".html")
    write_text(page, qualification_page(read_report(report)))
    return page


@contextlib.contextmanager
def page_beside(report: Path) -> Iterator[None]:
    """Inside, a report is made; beside it there is never the page of another one, also if this process is killed.

    Afterwards its page is there, that of an interrupted one too. Where nothing was written, what was there stays.
    """
    page, report_before = report.with_suffix(".html"), _content(report)
    aside = page.with_name(f".{page.name}.old")
    aside.unlink(missing_ok=True)  # of a process that was killed
    with contextlib.suppress(FileNotFoundError):
        page.replace(aside)
    try:
        yield
    except BaseException:
        if _content(report) != report_before:
            with contextlib.suppress(CrosschipError):
                write_qualification_page(report)
        else:
            with contextlib.suppress(FileNotFoundError):
                aside.replace(page)
        raise
    finally:
        aside.unlink(missing_ok=True)
    write_qualification_page(report)


def _content(path: Path) -> bytes | None:
    return path.read_bytes() if path.exists() else None


def _tiles(report: Document, findings: list[Document], exams: list[Document]) -> list[tuple[str, str, str]]:
    """(value, what it is, a line below)."""
    verdicts = [each.get("verdict") for each in findings]
    checks = sum(_checks(exam) for exam in exams)
    ended = sum(exam.get("ended") == "complete" for exam in exams)
    tiles = [
        (str(verdicts.count("FAIL")), "failures", f"{verdicts.count('PASS WITH LIMITS')} limits"),
        (
            count(checks),
            "checks made",
            f"in {len(exams)} exams, {ended} of them to their end" if exams else "no exam ran",
        ),
        (_seconds(report.get("time_s")), "taken", f"{report.get('tier', '?')} tier"),
    ]
    dtype = report.get("compute_dtype")
    trace = report.get("trace")
    if isinstance(dtype, str):
        operators = trace.get("operators") if isinstance(trace, dict) else None
        below = f"{len(operators)} operators traced" if isinstance(operators, list) else "no trace"
        tiles.append((dtype, "compute type", below))
    return tiles


def _seconds(value: Any) -> str:
    return duration(value) if is_number(value) else "–"


def _checks(exam: Document) -> float:
    numbers = exam.get("num_checks")
    return sum(each for each in numbers.values() if is_number(each)) if isinstance(numbers, dict) else 0


def _finding(finding: Document) -> dict[str, Any]:
    verdict = str(finding.get("verdict", "?"))
    limit = finding.get("limit")
    details = finding["details"] if isinstance(finding.get("details"), dict) else {}
    rows = [
        ("measured", shown(finding.get("measured"))),
        ("limit", shown(limit)),
        ("where the limit comes from", str(finding.get("limit_source") or "")),
        ("for the vendor", str(finding.get("reproducer") or "")),
        ("to see it again", str(details.get("again") or "")),
        ("not covered", str(finding.get("not_covered") or "")),
    ]
    return {
        "verdict": verdict,
        "state": _STATES.get(verdict, "open"),
        "subject": str(finding.get("subject", "?")),
        "message": str(finding.get("message", "")),
        "where": f"{finding.get('kind', '?')}, {finding.get('exam', '?')}"
        + (", critical" if finding.get("critical") else ""),
        "rows": [(label, text) for label, text in rows if text not in ("", "–")],
        "details": flat({name: each for name, each in details.items() if name != "again"}),
    }


def _exam_row(exam: Document, findings: list[Document]) -> dict[str, Any]:
    mine = [each.get("verdict") for each in findings if each.get("exam") == exam.get("exam")]
    verdict = str(exam.get("verdict", "?"))
    return {
        "name": str(exam.get("exam", "?")),
        "verdict": verdict,
        "state": _STATES.get(verdict, "open"),
        "ended": str(exam.get("ended", "?")),
        "checks": count(_checks(exam)),
        "failures": str(mine.count("FAIL")),
        "limits": str(mine.count("PASS WITH LIMITS")),
        "open": str(mine.count("INCONCLUSIVE")),
        "time": _seconds(exam.get("time_s")),
    }


def _tables(entries: list[tuple[str, Document]]) -> list[dict[str, Any]]:
    """Entries with the same keys as one table: its title, headings, rows, and how many rows were left out."""
    groups: dict[tuple[str, tuple[str, ...]], list[Document]] = {}
    for exam, entry in entries:
        groups.setdefault((exam, tuple(map(str, entry))), []).append(entry)
    return [
        {
            "title": f"{exam}: {_what(keys, rows)}",
            "total": len(rows),
            "keys": keys,
            "rows": [[shown(value) for value in row.values()] for row in rows[:_MOST_ROWS]],
            "left_out": max(0, len(rows) - _MOST_ROWS),
        }
        for (exam, keys), rows in groups.items()
    ]


def _what(keys: tuple[str, ...], rows: list[Document]) -> str:
    """What the rows have in common in words, else the names of their numbers."""
    for key in ("kind", "check", "what", "title"):
        values = {str(row[key]) for row in rows if key in row}
        if len(values) == 1 and key in keys:
            return values.pop()
    return ", ".join(keys[:5]) + (", …" if len(keys) > 5 else "")


def _not_covered(exams: list[Document]) -> list[tuple[str, list[str]]]:
    """(exam, what it did not look at); an exam that did not end says so."""
    found = []
    for exam in exams:
        listed = exam.get("not_covered")
        lines = [str(each) for each in listed] if isinstance(listed, list) else []
        if exam.get("ended") != "complete":
            lines.insert(0, f"the exam did not come to its end ({exam.get('ended', '?')})")
        if lines:
            found.append((str(exam.get("exam", "?")), lines))
    return found


def flat(document: Any, prefix: str = "") -> list[tuple[str, str]]:
    """A nested document as (dotted key, text) rows; what is empty is left out."""
    if isinstance(document, dict):
        return [
            row for key, value in document.items() for row in flat(value, f"{prefix}.{key}" if prefix else str(key))
        ]
    if document is None or document in ([], ""):
        return []
    return [(prefix, shown(document))]


def _about(report: Document) -> list[tuple[str, str]]:
    keys = ("subject", "origin", "role", "chip", "tier", "compute_dtype", "seed", "began", "crosschip")
    return [(key.replace("_", " "), shown(report[key])) for key in keys if report.get(key) is not None]


def _operators(trace: Any) -> list[str]:
    listed = trace.get("operators") if isinstance(trace, dict) else None
    return [str(each) for each in listed] if isinstance(listed, list) else []
