"""Reading qualification reports: what is none, or of a newer crosschip, is an error that names file, value, remedy."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from crosschip.errors import CrosschipError
from crosschip.report.documents import Document

__all__ = [
    "VERDICTS",
    "ReportError",
    "checked_report",
    "chip_title",
    "measurements",
    "read_document",
    "read_report",
    "shown",
]

NEWEST_SCHEMA = 1
VERDICTS = ("FAIL", "INCONCLUSIVE", "PASS WITH LIMITS", "PASS")
_MAX_CELL = 160  # characters of a nested value in a table


class ReportError(CrosschipError):
    """A file that is no qualification report, or one that cannot be compared with the others."""


def read_report(path: Path) -> Document:
    """Read a qualification report.

    Raises:
        ReportError: it is missing, no JSON, another document, or of a newer schema version.
    """
    return checked_report(read_document(path), str(path))


def read_document(path: Path) -> Any:
    """Read a JSON file of which nothing is known yet.

    Raises:
        ReportError: it is missing, or no JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ReportError(
            f"{path} cannot be read: {error}", "give the JSON file that `crosschip qualify` wrote"
        ) from None
    except (ValueError, RecursionError) as error:  # no JSON, no UTF-8, or a number of thousands of digits
        raise ReportError(
            f"{path} is not JSON: {error}", "make it again with `crosschip qualify --json FILE`"
        ) from None


def checked_report(document: Any, name: str) -> Document:
    """The document, if it is a qualification report that can be read; `name` stands in the error.

    Raises:
        ReportError: as `read_report`.
    """
    kind = document.get("document") if isinstance(document, dict) else type(document).__name__
    if not isinstance(document, dict) or kind != "qualification":
        raise ReportError(
            f"{name} is no qualification report: it is {kind!r}", "give a file that `crosschip qualify --json` wrote"
        )
    version = document.get("schema_version")
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise ReportError(f"{name} has schema_version {version!r}", "make it again with `crosschip qualify`")
    if version > NEWEST_SCHEMA:
        raise ReportError(
            f"{name} has schema version {version}, this crosschip reads up to {NEWEST_SCHEMA}",
            "update crosschip, or make the report again with this version",
        )
    for key, allowed in (("verdict", VERDICTS), ("role", ("train", "serve"))):
        if document.get(key) not in allowed:
            raise ReportError(
                f"{name} has {key} {document.get(key)!r}, which is none of {', '.join(allowed)}",
                "make it again with `crosschip qualify`",
            )
    for key in ("chip", "subject"):
        if not isinstance(document.get(key), str):
            raise ReportError(f"{name} has {key} {document.get(key)!r}", "make it again with `crosschip qualify`")
    return document


def measurements(report: Document) -> list[tuple[str, Document]]:
    """(exam, entry) of everything the exams measured."""
    return [
        (str(exam.get("exam", "?")), entry)
        for exam in _objects(report.get("exams"))
        for entry in _objects(exam.get("measurements"))
    ]


def chip_title(report: Document) -> str:
    """The chip as its fingerprint names it, with torch's name for it: `Ascend910B1 (npu:0)`."""
    chip = (report.get("fingerprint") or {}).get("chip") if isinstance(report.get("fingerprint"), dict) else None
    model = chip.get("model_name") if isinstance(chip, dict) else None
    return f"{model} ({report['chip']})" if isinstance(model, str) and model else str(report["chip"])


def shown(value: Any) -> str:
    """A value in a table: four digits of a number, nested values as JSON, cut."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}" if math.isfinite(value) else str(value)
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= _MAX_CELL else f"{text[:_MAX_CELL]} …"


def _objects(value: Any) -> list[Document]:
    return [each for each in value if isinstance(each, dict)] if isinstance(value, list) else []
