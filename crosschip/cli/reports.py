"""How every way of `qualify` ends: the table, the report and its page, the exit code of the verdict."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NoReturn

import typer

__all__ = ["end_with"]


def end_with(report: dict[str, Any], path: Path) -> NoReturn:
    """Print a report that lies at `path`, write its page beside it, and end with its verdict's exit code."""
    from crosschip.qualify.finding import EXIT_CODES
    from crosschip.report.qualify_page import write_qualification_page
    from crosschip.report.qualify_table import print_qualification

    page = write_qualification_page(path)
    print_qualification(report)
    print(f"\nreport: {path}\npage:   {page}")
    raise typer.Exit(EXIT_CODES[report["verdict"]])
