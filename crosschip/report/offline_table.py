"""An offline check in the terminal: the estimate first, then what is not native, then the known errors."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from crosschip.report.figures import percent

__all__ = ["print_offline_check"]

_COLOURS = {"native": "green", "decomposes": "green", "likely CPU fallback": "bold red", "unknown": "yellow"}
_IN_FULL = ("likely CPU fallback", "unknown")
_NUM_NAMED = 12  # operators of the other classes


def print_offline_check(document: dict[str, Any], console: Console | None = None) -> None:
    """Print an offline check document as people read it."""
    console = console or Console(highlight=False)
    source = document["source"]
    version = f" {source['version']}" if source["version"] else ""
    console.print(
        f"coverage estimate, not a verdict: {escape(document['subject'])}, one {escape(document['role'])} step in "
        f"{document['compute_dtype']}, against the {source['num_operators']} operators that "
        f"{source['form']}{escape(version)} lists",
        soft_wrap=True,
    )
    console.print()
    console.print(_coverage_table(document))
    for kind in _IN_FULL:
        _print_operators(console, kind, document["operators"][kind])
    _print_names(console, document)
    console.print("\nKnown errors of this estimate:")
    for line in [*document["known_errors"], *document["notes"]]:
        console.print(f"  {line}", markup=False, soft_wrap=True)
    console.print(f"\nlist: {source['file']}", markup=False, soft_wrap=True)
    for file in source["files"]:
        console.print(f"  {file['name']} sha256 {file['sha256'][:16]}", markup=False, soft_wrap=True)
    console.print("The run on the device is the verdict: crosschip qualify --chip DEVICE")


def _coverage_table(document: dict[str, Any]) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column("class")
    for heading in ("operators", "of them", "calls", "time on the CPU"):
        table.add_column(heading, justify="right")
    for kind, row in document["coverage"].items():
        colour = _COLOURS[kind] if row["num_operators"] else "dim"
        table.add_row(
            f"[{colour}]{kind}[/]",
            str(row["num_operators"]),
            percent(row["operator_share"]),
            str(row["num_calls"]),
            percent(row["time_share"]),
        )
    return table


def _print_operators(console: Console, kind: str, rows: list[dict[str, Any]]) -> None:
    if not rows:
        return
    console.print(f"\n[{_COLOURS[kind]}]{kind}[/]:")
    for row in rows:
        console.print(
            f"  {row['operator']}, {row['num_calls']} calls, {percent(row['time_share'])} of the time: {row['reason']}",
            markup=False,
            soft_wrap=True,
        )


def _print_names(console: Console, document: dict[str, Any]) -> None:
    for kind, rows in document["operators"].items():
        if kind in _IN_FULL or not rows:
            continue
        names = [row["operator"].removeprefix("aten.").removesuffix(".default") for row in rows]
        more = f" and {len(names) - _NUM_NAMED} more" if len(names) > _NUM_NAMED else ""
        console.print(f"\n{kind}: {', '.join(names[:_NUM_NAMED])}{more}", markup=False, soft_wrap=True)
