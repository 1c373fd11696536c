"""Files given to `compare`: qualification reports, and plans, told apart by what they say they are."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from crosschip.report.documents import Document
from crosschip.report.qualification import ReportError, checked_report, read_document

__all__ = ["read_compared"]


def read_compared(paths: Sequence[Path]) -> tuple[dict[str, Document], list[Document]]:
    """The reports by file name, and the plans among the files.

    Raises:
        ReportError: a file is neither, cannot be read, was given twice, or a newer crosschip wrote it.
    """
    reports: dict[str, Document] = {}
    plans: list[Document] = []
    for path in paths:
        document = read_document(path)
        if isinstance(document, dict) and document.get("document") == "plan":
            plans.append(document)
            continue
        if str(path) in reports:
            raise ReportError(f"{path} is given twice", "give the report of each chip once")
        reports[str(path)] = checked_report(document, str(path))
    return reports, plans
