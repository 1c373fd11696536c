"""A plan and a validation in the terminal."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

__all__ = ["print_plan", "print_validation"]


def _table(*headings: str) -> Table:
    table = Table(box=None, pad_edge=False)
    for heading in headings:
        table.add_column(heading)
    return table


def _time(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds >= 1 else f"{1000 * seconds:.3g} ms"


def print_plan(document: dict[str, Any], console: Console | None = None) -> None:
    """Print a plan's document as people read it."""
    console = console or Console(highlight=False)
    model, step = document["counts"], document["step"]
    lines = [
        f"{document['model']} on {document['cluster']}: {model['parameters']['value'] / 1e9:.4g} B parameters, "
        f"{model['active_parameters']['value'] / 1e9:.4g} B for a token; {model['tokens']['value']:.4g} tokens",
        f"layout   {step['layout']['text']} (best of {document['num_searched']})",
        f"step     {_time(step['step_s']['value'])}, {step['tokens_per_s']['value']:.4g} tokens/s, "
        f"{step['mfu']['value']:.1%} of the datasheet's rate",
        f"memory   {step['memory_bytes']['value'] / 1e9:.3g} GB on the fullest chip",
        f"goodput  {document['failures']['goodput']['p50']:.1%} "
        f"(stops every {document['failures']['between_stops_h']['p50']:.3g} h)",
    ]
    end, hours, money = document["dates"]["end"], document["money"]["chip_hours"], document["money"]["money"]
    lines.append(f"ends     {end['p10']} / {end['p50']} / {end['p90']} (P10 / P50 / P90)")
    if document["dates"]["by"] is not None:
        by = document["dates"]["by"]
        lines.append(f"by       {by['date']}: {by['chance']:.0%} of trials have ended")
    lines.append(f"costs    {hours['p50']:.4g} chip-hours" + (
        f", {money['p50']:.4g} {document['money']['currency']}" if money else "; no price is given"
    ))  # fmt: skip
    for line in lines:
        console.print(line, markup=False, soft_wrap=True)
    parts = _table("part of a step", "time", "share")
    for name, value in sorted(step["parts_s"].items(), key=lambda item: -item[1]):
        if value > 0:
            parts.add_row(name, _time(value), f"{value / step['step_s']['value']:.1%}")
    figures = _table("figure", "value", "from", "source")
    for name, figure in step["figures"].items():
        figures.add_row(name, f"{figure['value']:.4g} {figure['unit']}", figure["origin"], figure["source"])
    losers = _table("not chosen", "why")
    for loser in document["losers"]:
        losers.add_row(loser["layout"]["text"], loser["reason"])
    for table in (parts, figures, losers):
        if table.row_count:
            console.print()
            console.print(table)
    for note in document["notes"]:
        console.print(f"note: {note}", markup=False, soft_wrap=True)


def print_validation(document: dict[str, Any], console: Console | None = None) -> None:
    """Print every row, then every group against its threshold and every miss."""
    console = console or Console(highlight=False)
    rows = _table("row", "quantity", "predicted", "published", "error", "layout")
    for row in document["rows"]:
        mark = " (fitted on)" if row["calibration"] else ""
        if "skipped" in row:
            rows.add_row(row["id"], row["quantity"] or "-", "skipped", "-", "-", row["skipped"])
            continue
        published = "-" if row["published"] is None else f"{row['published']:.5g}"
        error = "-" if row["error"] is None else f"{row['error']:+.1%}"
        rows.add_row(row["id"] + mark, row["quantity"], f"{row['predicted']:.5g}", published, error, row["layout"])
    groups = _table("group, rows not fitted on", "rows", "mean error", "median", "worst", "threshold", "")
    for group in document["groups"]:
        most, met = group["threshold"], group["met"]
        groups.add_row(
            group["name"], str(group["num_rows"]), f"{group['mean_error']:.1%}", f"{group['median_error']:.1%}",
            f"{group['worst_error']:.1%} {group['worst_row']}", "-" if most is None else f"{most:.0%}",
            "" if met is None else "met" if met else "MISSED",
        )  # fmt: skip
    for table in (rows, groups):
        console.print(table)
        console.print()
    for group in document["groups"]:
        if group["misses"]:
            console.print(
                f"{group['name']}: off by more than {group['threshold']:.0%}: {', '.join(group['misses'])}",
                markup=False, soft_wrap=True,
            )  # fmt: skip
