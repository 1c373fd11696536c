"""What the verbs that examine say on the way, and how they end: table, report and page, the verdict's exit code."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import typer

from crosschip.errors import QualifyError

__all__ = ["end_with", "output_place", "report_place", "tell"]


def report_place(path: Path) -> Path:
    """`path`, once it is known that a report can be written there: an examination takes minutes.

    Raises:
        QualifyError: it is a directory, where the page goes, or in a place that cannot be written to.
    """
    remedy = "name a file for the report with --json"
    output_place(path, "the report", "--json")
    if path.suffix == ".html":
        raise QualifyError(f"the report cannot be written to {path}: its page goes there", f"{remedy}: OUT.json")
    if (page := path.with_suffix(".html")).is_dir():
        raise QualifyError(f"the page of the report cannot be written to {page}: it is a directory", remedy)
    return path


def output_place(path: Path | None, what: str, option: str, inputs: Sequence[Path] = ()) -> None:
    """Refuse a `path` that `what` cannot be written to, before any work is done for it; without one nothing is written.

    Raises:
        QualifyError: it is a directory, a device, one of the `inputs`, or in a place that cannot be written to.
    """
    if path is None:
        return
    remedy = f"name a file for {what} with {option}"
    if path.is_dir():
        raise QualifyError(f"{what} cannot be written to {path}: it is a directory", remedy)
    if path.exists() and not path.is_file():
        raise QualifyError(f"{what} cannot be written to {path}: it is no ordinary file", remedy)
    if (same := next((each for each in inputs if each.resolve() == path.resolve()), None)) is not None:
        raise QualifyError(f"{what} cannot be written to {path}: {same} is read, and would be lost", remedy)
    above = next(each for each in path.absolute().parents if each.exists())
    try:
        tempfile.TemporaryFile(dir=above).close()
    except OSError as error:
        raise QualifyError(f"{what} cannot be written to {path}: {above}: {error.strerror}", remedy) from None


def end_with(examine: Callable[[], dict[str, Any]], path: Path) -> NoReturn:
    """Examine, print the report that then lies at `path`, its page beside it, and end with its verdict's exit code.

    An examination that is interrupted leaves a page of its report, too.
    """
    from crosschip.qualify.finding import EXIT_CODES
    from crosschip.report.qualify_page import page_beside
    from crosschip.report.qualify_table import print_qualification

    with page_beside(path):
        report = examine()
    print_qualification(report)
    print(f"\nreport: {path}\npage:   {path.with_suffix('.html')}")
    raise typer.Exit(EXIT_CODES[report["verdict"]])


def tell(line: str) -> None:
    """A line of progress, for people who wait."""
    if sys.stderr.isatty():
        print(f"crosschip: {line}", file=sys.stderr, flush=True)
