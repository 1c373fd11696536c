"""Whether reports can stand side by side: of one model, readable, at least two."""

from __future__ import annotations

from collections.abc import Mapping

from crosschip.report.documents import Document
from crosschip.report.qualification import ReportError, checked_report

__all__ = ["least_named", "refuse_incomparable"]


def refuse_incomparable(reports: Mapping[str, Document]) -> list[str]:
    """Notes on what makes the comparison less certain.

    Raises:
        ReportError: fewer than two reports, one that is none or too new, or reports of different subjects.
    """
    if len(reports) < 2:
        raise ReportError(
            f"{len(reports)} report is too few to compare", "give two reports of `crosschip qualify`, or more"
        )
    for file, report in reports.items():
        checked_report(report, file)
    (first_file, first), *others = sorted(reports.items(), key=lambda item: least_named(item[1]))
    notes = []
    for file, report in others:
        if _subject(report) != _subject(first) and not _is_unnamed(report, first):
            raise ReportError(
                f"{file} is of the subject {report['subject']!r}, {first_file} of {first['subject']!r}",
                "compare reports of one model and workload; an engine serves a model under a name of its own: examine "
                "each with --model DIR, and the report bears the directory's name, which must be the same",
            )
        if report.get("origin") != first.get("origin"):
            notes.append(
                f"{file} was made from {report.get('origin')!r}, {first_file} from {first.get('origin')!r}; that "
                "they are the same model rests on its name alone"
            )
        if None not in (report.get("compute_dtype"), first.get("compute_dtype")) and (
            report["compute_dtype"] != first["compute_dtype"]
        ):
            notes.append(
                f"{file} computes in {report['compute_dtype']}, {first_file} in {first['compute_dtype']}: each error "
                "is judged in its own type, and their speeds are not of the same work"
            )
    return notes


def least_named(report: Document) -> tuple[bool, bool]:
    """How little a report says of its subject: the smaller, the better the subject's name is known."""
    return not report.get("compute_dtype"), not report.get("fingerprint")


def _subject(report: Document) -> str:
    return str(report["subject"])


def _is_unnamed(report: Document, first: Document) -> bool:
    """A chip or engine that could not be used leaves a report without a fingerprint, whose subject is its origin's."""
    return not report.get("fingerprint") and report.get("origin") == first.get("origin")
