"""What the doctor found, for people and for machines."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from crosschip import __version__
from crosschip.errors import EXIT_FAIL, EXIT_OK

__all__ = ["Finding", "Report", "print_report"]

SCHEMA_VERSION = 1

State = Literal["ok", "note", "problem"]


@dataclass(frozen=True)
class Finding:
    """One thing looked at. A `problem` has a remedy; a `note` is worth knowing and may be all right."""

    state: State
    subject: str
    detail: str
    remedy: str = ""


@dataclass(frozen=True)
class Report:
    """All findings, in the order in which they were looked at."""

    findings: list[Finding]

    @property
    def exit_code(self) -> int:
        """0 when nothing is wrong, else 1."""
        return EXIT_FAIL if any(finding.state == "problem" for finding in self.findings) else EXIT_OK

    def document(self) -> dict[str, Any]:
        """The report for JSON."""
        return {
            "schema_version": SCHEMA_VERSION,
            "crosschip": __version__,
            "healthy": self.exit_code == EXIT_OK,
            "findings": [asdict(finding) for finding in self.findings],
        }


def print_report(report: Report) -> None:
    """Print a table to stdout, and below it each problem with what to do."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    colours = {"ok": "green", "note": "yellow", "problem": "bold red"}
    console = Console(highlight=False)
    table = Table(box=None, pad_edge=False)
    for heading in ("state", "what", "found"):
        table.add_column(heading, overflow="fold")
    for finding in report.findings:
        colour = colours[finding.state]
        table.add_row(f"[{colour}]{finding.state}[/]", escape(finding.subject), escape(finding.detail))
    console.print(table)
    for finding in report.findings:
        if finding.remedy:
            console.print(f"\n{finding.subject}: {finding.detail}", markup=False, soft_wrap=True)
            console.print(f"  what to do: {finding.remedy}", markup=False, soft_wrap=True)
    num_problems = sum(finding.state == "problem" for finding in report.findings)
    console.print(f"\n{num_problems} problem{'' if num_problems == 1 else 's'} found" if num_problems else "\nall fine")
