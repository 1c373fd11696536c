"""What the verbs that examine say on the way, and how they end: table, report and page, the verdict's exit code."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, NoReturn

import typer

__all__ = ["end_with", "tell"]


def end_with(report: dict[str, Any], path: Path) -> NoReturn:
    """Print a report that lies at `path`, write its page beside it, and end with its verdict's exit code."""
    from crosschip.qualify.finding import EXIT_CODES
    from crosschip.report.qualify_page import write_qualification_page
    from crosschip.report.qualify_table import print_qualification

    page = write_qualification_page(path)
    print_qualification(report)
    print(f"\nreport: {path}\npage:   {page}")
    raise typer.Exit(EXIT_CODES[report["verdict"]])


def tell(line: str) -> None:
    """A line of progress, for people who wait."""
    if sys.stderr.isatty():
        print(f"crosschip: {line}", file=sys.stderr, flush=True)
