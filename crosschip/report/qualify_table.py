"""A qualification report in the terminal: the three worst findings first, then the exams, then what was not covered."""

from __future__ import annotations

from textwrap import shorten
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

__all__ = ["print_qualification"]

_NUM_WORST = 3
_NUM_NOT_COVERED = 12
_CELL, _LONGEST_LINE = 60, 300  # characters; the report has all of it
_COLOURS = {"PASS": "green", "PASS WITH LIMITS": "yellow", "INCONCLUSIVE": "yellow", "FAIL": "bold red"}


def print_qualification(report: dict[str, Any], console: Console | None = None) -> None:
    """Print a report document as people read it."""
    console = console or Console(highlight=False)
    verdict = report["verdict"]
    console.print(
        f"[{_COLOURS[verdict]}]{verdict}[/]: {escape(report['chip'])} to {report['role']} "
        f"{escape(report['subject'])}{_in_dtype(report)} ({report['tier']} tier, {report['time_s']:.0f} s)"
    )
    if not report["complete"]:
        console.print("[yellow]The qualification was interrupted; what follows was measured before.[/]")
    findings = report["findings"]
    for number, finding in enumerate(findings[:_NUM_WORST], start=1):
        _print_finding(console, number, finding)
    _print_others(console, findings[_NUM_WORST:])
    console.print()
    console.print(_exam_table(report))
    _print_not_covered(console, report)


def _in_dtype(report: dict[str, Any]) -> str:
    return f" in {report['compute_dtype']}" if report["compute_dtype"] else ""


def _print_finding(console: Console, number: int, finding: dict[str, Any]) -> None:
    verdict = finding["verdict"]
    console.print()
    console.print(
        f"{number}. [{_COLOURS[verdict]}]{verdict}[/] {finding['kind']}, {finding['exam']}: "
        f"[bold]{escape(finding['subject'])}[/]",
        soft_wrap=True,
    )
    console.print(f"   {finding['message']}", markup=False, soft_wrap=True)
    if finding["measured"] is not None:
        limit = f", limit {_shown(finding['limit'])}" if finding["limit"] is not None else ""
        source = f" ({finding['limit_source']})" if finding["limit_source"] else ""
        console.print(f"   measured {_shown(finding['measured'])}{limit}{source}", markup=False, soft_wrap=True)
    if finding["reproducer"]:
        console.print(f"   for the vendor: {finding['reproducer']}", markup=False, soft_wrap=True)
    elif again := (finding.get("details") or {}).get("again"):
        console.print(f"   to see it again: {again}", markup=False, soft_wrap=True)


def _print_others(console: Console, findings: list[dict[str, Any]]) -> None:
    if not findings:
        return
    table = Table(box=None, pad_edge=False, title=f"{len(findings)} more", title_justify="left")
    for heading in ("verdict", "exam", "subject", "check", "measured", "limit"):
        table.add_column(heading, overflow="fold")
    for finding in findings:
        table.add_row(
            f"[{_COLOURS[finding['verdict']]}]{finding['verdict']}[/]",
            finding["exam"],
            escape(finding["subject"]),
            finding["check"],
            escape(_briefly(finding["measured"])),
            escape(_briefly(finding["limit"])),
        )
    console.print()
    console.print(table)


def _exam_table(report: dict[str, Any]) -> Table:
    table = Table(box=None, pad_edge=False)
    for heading in ("exam", "verdict", "ended", "checks", "failures", "limits", "open"):
        table.add_column(heading)
    table.add_column("time", justify="right")
    for exam in report["exams"]:
        mine = [finding["verdict"] for finding in report["findings"] if finding["exam"] == exam["exam"]]
        table.add_row(
            exam["exam"],
            f"[{_COLOURS[exam['verdict']]}]{exam['verdict']}[/]",
            exam["ended"],
            str(sum(exam["num_checks"].values())),
            *(str(mine.count(verdict)) for verdict in ("FAIL", "PASS WITH LIMITS", "INCONCLUSIVE")),
            f"{exam['time_s']:.0f} s",
        )
    return table


def _print_not_covered(console: Console, report: dict[str, Any]) -> None:
    missing = [f"{exam['exam']}: {what}" for exam in report["exams"] for what in exam["not_covered"]]
    if not missing:
        return
    console.print("\nNot covered:")
    for line in missing[:_NUM_NOT_COVERED]:
        shown = shorten(line, _LONGEST_LINE, placeholder=" ... (all of it is in the report)")
        console.print(f"  {shown}", markup=False, soft_wrap=True)
    if len(missing) > _NUM_NOT_COVERED:
        console.print(f"  and {len(missing) - _NUM_NOT_COVERED} more, in the report")


def _briefly(value: Any) -> str:
    return shorten(_shown(value), _CELL, placeholder=" ...")


def _shown(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
