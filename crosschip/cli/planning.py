"""The verb that says by when, on what and at what cost: plan, and plan validate. No torch."""

from __future__ import annotations

import json
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from crosschip.cli.default_command import DefaultCommandGroup
from crosschip.cli.options import SetOption
from crosschip.errors import EXIT_FAIL, RecipeError

if TYPE_CHECKING:
    from crosschip.plan.cluster import Cluster

__all__ = ["plan", "plan_app", "validate"]

_JSON_HELP = "Write the JSON document there."


class _RecipeOrCommand(DefaultCommandGroup):
    default = "run"


plan_app = typer.Typer(
    cls=_RecipeOrCommand, no_args_is_help=True, rich_markup_mode=None, add_completion=False,
    help="Say memory, layout, step time, goodput, cost and date of a run on a cluster: plan RECIPE [OPTIONS].",
    context_settings={"help_option_names": ["-h", "--help"]},
)  # fmt: skip


def _day(text: str | None, option: str) -> date | None:
    if text is None:
        return None
    try:
        return date.fromisoformat(text)
    except ValueError:
        raise RecipeError(f"{option} {text!r} is no date", "write it as YYYY-MM-DD") from None


def _cluster(path: Path | None, report: Path | None) -> tuple[Cluster, list[str]]:
    from crosschip.plan.cluster import read_cluster
    from crosschip.plan.host import host_cluster
    from crosschip.plan.measured import with_report

    cluster = read_cluster(path) if path is not None else host_cluster()
    return with_report(cluster, report) if report is not None else (cluster, [])


def plan(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="The TOML file that describes the run.")],
    cluster: Annotated[
        Path | None,
        typer.Option(
            "--cluster", metavar="FILE", help="The cluster: chips, nodes, network, price; else this machine.",
            show_default=False,
        ),
    ] = None,
    report: Annotated[
        Path | None,
        typer.Option("--report", metavar="FILE", help="A report of `qualify`, for measured rates.", show_default=False),
    ] = None,
    by: Annotated[
        str | None,
        typer.Option("--by", metavar="YYYY-MM-DD", help="The date it must be ready by.", show_default=False),
    ] = None,
    start: Annotated[
        str | None,
        typer.Option("--start", metavar="YYYY-MM-DD", help="When it starts; today if not given.", show_default=False),
    ] = None,
    overrides: SetOption = None,
    json_path: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help=_JSON_HELP, show_default=False)
    ] = None,
    page: Annotated[
        Path | None, typer.Option("--page", metavar="FILE", help="Write the HTML page there.", show_default=False)
    ] = None,
    explain: Annotated[
        str | None,
        typer.Option("--explain", metavar="KEY", help="Show one part only, as in step.parts_s.", show_default=False),
    ] = None,
) -> None:  # fmt: skip
    """Say memory, layout, step time, goodput, cost and date of a run on a cluster."""
    from crosschip.plan.document import explain as explained
    from crosschip.plan.document import plan_document
    from crosschip.plan.planning import plan_run
    from crosschip.plan.table import print_plan
    from crosschip.recipe import load_recipe
    from crosschip.rundir import write_json, write_text

    today = date.today()
    begin, end = _day(start, "--start") or today, _day(by, "--by")
    if end is not None and end < today:
        raise RecipeError(f"--by {end} is over: today is {today}", "give a date to come")
    resolved = load_recipe(recipe, overrides)
    where, notes = _cluster(cluster, report)
    stage = "train" if resolved.train is not None else "sft"
    document = plan_document(plan_run(resolved, where, stage), where, begin, end, tuple(notes))
    if json_path is not None:
        write_json(json_path, document)
    if page is not None:
        from crosschip.plan.page import plan_page

        write_text(page, plan_page(document))
    if explain is not None:
        print(json.dumps(explained(document, explain), indent=2, ensure_ascii=False))
    else:
        print_plan(document)


def validate(
    rows: Annotated[
        Path | None,
        typer.Option(
            "--rows", metavar="FILE", help="A CSV file of published runs; else the shipped one.", show_default=False
        ),
    ] = None,
    json_path: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help=_JSON_HELP, show_default=False)
    ] = None,
) -> None:  # fmt: skip
    """Predict published runs and print every miss.

    Exit codes: 0 every threshold met, 1 one is missed.
    """
    from crosschip.plan.table import print_validation
    from crosschip.plan.validate import read_rows, validate_rows
    from crosschip.plan.validate.rows import SHIPPED_ROWS
    from crosschip.rundir import write_json

    document = validate_rows(read_rows(rows or SHIPPED_ROWS))
    if json_path is not None:
        write_json(json_path, document)
    print_validation(document)
    if any(group["met"] is False for group in document["groups"]):
        raise typer.Exit(EXIT_FAIL)
