"""A drill's report: in the terminal, and as Markdown."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

__all__ = ["drill_markdown", "print_drill"]

_HEADINGS = ("fault", "noticed as", "after", "steps again", "the same bits")


def print_drill(report: dict[str, Any], console: Console | None = None) -> None:
    """Print a drill's document as people read it."""
    console = console or Console(highlight=False)
    table = Table(box=None, pad_edge=False)
    for heading in _HEADINGS:
        table.add_column(heading)
    for row in report["faults"]:
        table.add_row(*_cells(row))
    console.print(table)
    console.print()
    for line in _sentences(report):
        console.print(line, markup=False, soft_wrap=True)


def drill_markdown(report: dict[str, Any], heading: str) -> str:
    """The document as a Markdown section."""
    lines = [f"## {heading}", "", *_sentences(report), ""]
    if report["faults"]:
        lines += ["| " + " | ".join(_HEADINGS) + " |", "| " + " | ".join("---" for _ in _HEADINGS) + " |"]
        lines += ["| " + " | ".join(_cells(row)) + " |" for row in report["faults"]]
        lines.append("")
    return "\n".join(lines)


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    seen = f"{row['event']}" if row["detected"] else "NOT NOTICED"
    exact = {True: "yes", False: "NO", None: "-"}[row["bit_exact"]]
    latency = f"{row['latency_s']:.1f} s" if row["latency_s"] is not None else "-"
    return row["title"], seen, latency, str(row["steps_lost"]), exact


def _sentences(report: dict[str, Any]) -> list[str]:
    faults, alarms = report["faults"], report["false_alarms"]
    noticed = sum(1 for row in faults if row["detected"])
    layout = f"{report['num_groups']} groups of {report['num_ranks']}" if report["num_groups"] > 1 else "one group"
    good = report["goodput"]
    lines = [
        f"{layout}, {report['duration_s'] / 60:.0f} minutes, {report['num_steps']} steps of "
        f"{report['clean_step_s']:.2f} s without faults.",
        f"{noticed} of {len(faults)} faults noticed, {len(alarms)} false alarms; {good['committed']:.1%} of the "
        f"computed steps were committed, {good['of_time']:.1%} of the time brought the run forward.",
    ]
    lines += [
        f"false alarm: group {each['group']}, step {each['step']}: {each['event']}: {each['detail']}" for each in alarms
    ]
    if report["not_planted"]:
        lines.append(f"not planted: {', '.join(report['not_planted'])}")
    lines += [f"left out: {', '.join(names)}: {why}" for why, names in report.get("left_out", {}).items()]
    return lines
