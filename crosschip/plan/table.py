"""A plan and a validation in the terminal."""

from __future__ import annotations

from collections.abc import Iterator
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


def _days(days: float) -> str:
    if days >= 2:
        return f"{days:.3g} days"
    return f"{days * 24:.3g} h" if days * 24 >= 1 else f"{days * 1440:.3g} min"


def print_plan(document: dict[str, Any], console: Console | None = None) -> None:
    """Print a plan's document as people read it."""
    console = console or Console(highlight=False)
    for line in _lines(document):
        console.print(line, markup=False, soft_wrap=True)
    for table in _tables(document):
        if table.row_count:
            console.print()
            console.print(table)
    console.print()
    for rule in document["fall_backs"]:
        console.print(f"fall-back from {rule['from']} to {rule['to']}: with less than", markup=False, soft_wrap=True)
        for each in rule["milestones"]:
            console.print(f"  {each['words']}", markup=False, soft_wrap=True)
        if rule["by"] is not None:
            last = f"on {rule['last_switch']} at the latest" if rule["last_switch"] else "never, not even at once"
            console.print(f"  a switch still meets {rule['by']} (P90): {last}", markup=False, soft_wrap=True)
    for note in document["notes"]:
        console.print(f"note: {note}", markup=False, soft_wrap=True)


def _lines(document: dict[str, Any]) -> list[str]:
    """Model, the longest stage's step, stops, dates, cost, serving: a line each."""
    model, step = document["counts"], document["step"]
    lines = [
        f"{document['model']} on {document['cluster']}: {model['parameters']['value'] / 1e9:.4g} B parameters, "
        f"{model['active_parameters']['value'] / 1e9:.4g} B for a token",
        f"layout   {step['layout']['text']} (best of {document['num_searched']} for {document['main_stage']})",
        f"step     {_time(step['step_s']['value'])}, {step['tokens_per_s']['value']:.4g} tokens/s, "
        f"{step['mfu']['value']:.1%} of the datasheet's rate",
        f"memory   {step['memory_bytes']['value'] / 1e9:.3g} GB on the fullest chip",
        f"goodput  {document['failures']['goodput']['p50']:.1%} "
        f"(stops every {document['failures']['between_stops_h']['p50']:.3g} h)",
    ]
    end, hours, money = document["dates"]["end"], document["money"]["chip_hours"], document["money"]["money"]
    lines.append(f"ends     {end['p10']} / {end['p50']} / {end['p90']} (P10 / P50 / P90)")
    lines.append(f"takes    {' / '.join(map(_days, document['dates']['end_days'].values()))}")
    if (by := document["dates"]["by"]) is not None:
        lines.append(f"by       {by['date']}: {by['chance']:.0%} of trials have ended")
    cost = f", {money['p50']:.4g} {document['money']['currency']}" if money else "; no price is given"
    lines.append(f"costs    {hours['p50']:.4g} chip-hours{cost}")
    if (serving := document["serving"]) is not None:
        decode, prefill = serving["decode"], serving["prefill"]
        lines.append(
            f"serves   {serving['load']['requests_per_s']:g} requests/s on {serving['chips']} x {serving['chip']}: "
            f"prefill {prefill['instances']} x {prefill['chips_per_instance']} ({_time(prefill['first_token_s'])} "
            f"to the first token, P95), decode {decode['instances']} x {decode['chips_per_instance']} "
            f"({_time(decode['token_s'])} a token)"
        )
    return lines


def _tables(document: dict[str, Any]) -> Iterator[Table]:
    """Stages, the longest one's step by its parts, what moves the end, the figures, layouts that lost."""
    stages = _table("stage", "chips", "steps", "a step", "begins (P50)", "ends (P50)", "ends (P90)")
    planned = {each["name"]: each for each in document["stages"]}
    for each in document["dates"]["stages"]:
        plan = planned.get(each["name"])
        told = ("-", "-") if plan is None else (f"{plan['steps']:,}", _time(plan["step_s"]["value"]))
        dates = (each["begin"]["p50"], each["end"]["p50"], each["end"]["p90"])
        stages.add_row(each["name"], f"{each['chips']:,}", *told, *dates)
    yield stages
    layouts = _table("stage", "layout", "memory")
    for each in document["stages"]:
        update = each["update"]
        layouts.add_row(each["name"], update["layout"]["text"], f"{update['memory_bytes']['value'] / 1e9:.3g} GB")
    yield layouts
    step = document["step"]
    parts = _table("part of a step", "time", "share")
    for name, value in sorted(step["parts_s"].items(), key=lambda item: -item[1]):
        if value > 0:
            parts.add_row(name, _time(value), f"{value / step['step_s']['value']:.1%}")
    yield parts
    effects = _table("what moves the end (P50)")
    for each in document["sensitivity"]:
        effects.add_row(each["words"])
    yield effects
    figures = _table("figure", "value", "from", "source")
    for name, figure in step["figures"].items():
        figures.add_row(name, f"{figure['value']:.4g} {figure['unit']}", figure["origin"], figure["source"])
    yield figures
    losers = _table("not chosen", "why")
    for loser in document["losers"]:
        losers.add_row(loser["layout"]["text"], loser["reason"])
    yield losers


def _validated(row: dict[str, Any]) -> tuple[str, ...]:
    """A row's cells under `_VALIDATED`."""
    if "skipped" in row:
        return (row["id"], row["quantity"] or "-", "skipped", "-", "-", "-", row["skipped"])
    published = "-" if row["published"] is None else f"{row['published']:.5g}"
    error = "-" if row["error"] is None else f"{row['error']:+.1%}"
    mark = " (fitted on)" if row["calibration"] else ""
    numbers = (f"{row['predicted']:.5g}", published, error, f"{row['num_chips']:,}")
    return (row["id"] + mark, row["quantity"], *numbers, row["layout"])


_VALIDATED = ("row", "quantity", "predicted", "published", "error", "chips", "layout")


def _print_rows(rows: list[dict[str, Any]], console: Console) -> None:
    """A line for each row, and under it what was assumed, searched for or taken for something else."""
    lines = [_VALIDATED, *map(_validated, rows)]
    widths = [max(len(cells[column]) for cells in lines) for column in range(len(_VALIDATED) - 1)] + [0]
    for cells, row in zip(lines, [{}, *rows], strict=True):
        line = "  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True))
        console.print(line, markup=False, soft_wrap=True)
        if notes := row.get("notes"):
            console.print(f"    {'; '.join(notes)}", markup=False, soft_wrap=True)


def print_validation(document: dict[str, Any], console: Console | None = None) -> None:
    """Print every row with what was assumed for it, then every group against its threshold and every miss."""
    console = console or Console(highlight=False)
    _print_rows(document["rows"], console)
    console.print()
    groups = _table("group, rows not fitted on", "rows", "mean error", "median", "worst", "threshold", "")
    for group in document["groups"]:
        most, met = group["threshold"], group["met"]
        groups.add_row(
            group["name"], str(group["num_rows"]), f"{group['mean_error']:.1%}", f"{group['median_error']:.1%}",
            f"{group['worst_error']:.1%} {group['worst_row']}", "-" if most is None else f"{most:.0%}",
            "" if met is None else "met" if met else "MISSED",
        )  # fmt: skip
    console.print(groups)
    console.print()
    for group in document["groups"]:
        if group["misses"]:
            console.print(
                f"{group['name']}: off by more than {group['threshold']:.0%}: {', '.join(group['misses'])}",
                markup=False, soft_wrap=True,
            )  # fmt: skip
