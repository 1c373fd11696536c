"""Files given to `compare`: qualification reports, and plans, told apart by what they say they are."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from crosschip.report.documents import Document
from crosschip.report.qualification import ReportError, checked_report, read_document

__all__ = ["NEWEST_PLAN", "read_compared"]

NEWEST_PLAN = 2


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
            plans.append(_checked_plan(document, path))
            continue
        if str(path) in reports:
            raise ReportError(f"{path} is given twice", "give the report of each chip once")
        reports[str(path)] = checked_report(document, str(path))
    return reports, plans


def _checked_plan(document: Document, path: Path) -> Document:
    version = document.get("schema_version")
    if isinstance(version, int) and version > NEWEST_PLAN:
        raise ReportError(
            f"{path} is a plan of schema version {version}, this crosschip reads up to {NEWEST_PLAN}",
            "update crosschip, or make the plan again with this version",
        )
    return document
