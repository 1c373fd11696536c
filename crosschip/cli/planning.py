"""The verb that says by when, on what and at what cost: plan, and plan validate. No torch."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from crosschip.cli.default_command import DefaultCommandGroup
from crosschip.cli.guard import guarded
from crosschip.cli.options import RecipeArgument, SetOption
from crosschip.errors import EXIT_FAIL, RecipeError

if TYPE_CHECKING:
    from crosschip.plan.calendar_tables import ScheduleTable
    from crosschip.plan.cluster import Cluster
    from crosschip.plan.failures import Soak
    from crosschip.plan.serving import Load
    from crosschip.plan.stages import StageChoices
    from crosschip.plan.whole_run import Asked
    from crosschip.recipe import Recipe

__all__ = ["plan", "plan_app", "validate"]

_JSON_HELP = "Write the JSON document there."
_ABOUT = {  # an option, and those that mean nothing without it
    "requests_per_s": ("serve_cluster", "prompt_tokens", "answer_tokens", "first_token_s", "token_s"),
    "compare_cluster": ("switch_days", "switch_cost", "delay_cost_per_day", "start_anew"),
}


class _RecipeOrCommand(DefaultCommandGroup):
    """`plan RECIPE`, `plan validate`, and `plan --explain KEY` alone, which needs no recipe."""

    default = "run"

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """See the class (typer calls it)."""
        option, _, key = " ".join(args).replace("=", " ", 1).partition(" ")
        if option == "--explain" and key and " " not in key:
            guarded(_explain_alone)(key)
            ctx.exit()
        return super().parse_args(ctx, args)


def _explain_alone(key: str) -> None:
    """Print what a key of a plan's document means, in every plan."""
    from crosschip.plan.document import meaning

    print(json.dumps(meaning(key), indent=2, ensure_ascii=False))


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


def _start(text: str | None, by: str | None) -> date:
    """The day it starts.

    Raises:
        RecipeError: a date that is none, or `--by` is over.
    """
    today, end = date.today(), _day(by, "--by")
    if end is not None and end < today:
        raise RecipeError(f"--by {end} is over: today is {today}", "give a date to come")
    return _day(text, "--start") or today


def _read(path: Path) -> Cluster:
    from crosschip.plan.cluster import read_cluster

    return read_cluster(path)


def _where(
    path: Path | None, report: Path | None, blackouts: list[str] | None, ramp: list[str] | None
) -> tuple[Cluster, Soak | None, list[str]]:
    """The cluster with what a report measured and what the command line says of its calendar; the report's soak."""
    from crosschip.plan.host import host_cluster
    from crosschip.plan.measured import soak_of, with_report

    cluster = _read(path) if path is not None else host_cluster()
    cluster = replace(cluster, schedule=_calendar(cluster, blackouts or [], ramp or []))
    if report is None:
        return cluster, None, []
    cluster, notes = with_report(cluster, report)
    soak, more = soak_of(report, cluster.num_chips)
    return cluster, soak, notes + more


def _calendar(cluster: Cluster, blackouts: list[str], ramp: list[str]) -> ScheduleTable:
    from crosschip.plan.calendar_tables import BlackoutTable

    schedule, windows, pairs = cluster.schedule, [], []
    for text in blackouts:
        first, *rest = text.split(":", 2)
        begin, end = _day(first, "--blackout"), _day(rest[0] if rest else first, "--blackout")
        assert begin is not None
        assert end is not None
        if end < begin:
            raise RecipeError(f"--blackout {text!r} ends before it begins", "write it as FIRST:LAST")
        windows.append(BlackoutTable(first=begin, last=end, why=rest[1] if len(rest) > 1 and rest[1] else "no cluster"))
    for text in ramp:
        day, _, share = text.partition(":")
        try:
            pairs.append((float(day), float(share)))
        except ValueError:
            raise RecipeError(
                f"--ramp {text!r} is no pair of numbers", "write it as DAY:SHARE, such as 14:0.5"
            ) from None
    update = {"blackouts": (*schedule.blackouts, *windows), "ramp": tuple(pairs) or schedule.ramp}
    return schedule.model_copy(update=update)


def _choices(rollouts: Path | None, joined: list[Path] | None, rollout_tokens: float | None) -> StageChoices:
    from crosschip.plan.stages import StageChoices

    return StageChoices(
        None if rollouts is None else _read(rollouts), tuple(_read(path) for path in joined or []), rollout_tokens
    )


def _load(
    requests_per_s: float | None, prompt: float, answer: float, first_token_s: float, token_s: float
) -> Load | None:
    from crosschip.plan.serving import Load

    return None if requests_per_s is None else Load(requests_per_s, prompt, answer, first_token_s, token_s)


def _refuse_without_effect(context: typer.Context) -> None:
    """What was asked for is done or refused."""

    def is_given(name: str) -> bool:
        source = context.get_parameter_source(name)
        return source is not None and source.name == "COMMANDLINE"

    for needed, names in _ABOUT.items():
        for name in filter(is_given, () if is_given(needed) else names):
            option, other = (f"--{each.replace('_', '-')}" for each in (name, needed))
            raise RecipeError(f"{option} means nothing without {other}", f"give {other} as well, or leave {option} out")


def _file(name: str, text: str) -> Any:
    return typer.Option(name, metavar="FILE", help=text, show_default=False)


def _number(name: str, metavar: str, text: str) -> Any:
    return typer.Option(name, metavar=metavar, help=text, show_default=False)


def plan(
    context: typer.Context,
    recipe: RecipeArgument,
    cluster: Annotated[
        Path | None, _file("--cluster", "The cluster: chips, nodes, network, price, schedule; else this machine.")
    ] = None,
    report: Annotated[Path | None, _file("--report", "A report of `qualify`, for measured rates.")] = None,
    compare_cluster: Annotated[
        list[Path] | None,
        _file("--compare-cluster", "The same run there: how much later, and when to fall back to it. Repeatable."),
    ] = None,
    rollout_cluster: Annotated[
        Path | None, _file("--rollout-cluster", "The chips that answer in [rl]; else those that learn.")
    ] = None,
    join_cluster: Annotated[
        list[Path] | None, _file("--join-cluster", "One more group there, joined by the recipe's [links]. Repeatable.")
    ] = None,
    serve_cluster: Annotated[
        Path | None, _file("--serve-cluster", "The chips that serve the requests; else those that train.")
    ] = None,
    by: Annotated[str | None, _number("--by", "YYYY-MM-DD", "The date it must be ready by.")] = None,
    start: Annotated[str | None, _number("--start", "YYYY-MM-DD", "When it starts; today if not given.")] = None,
    blackout: Annotated[
        list[str] | None,
        _number("--blackout", "FIRST:LAST[:WHY]", "Days without the cluster, both included. Repeatable."),
    ] = None,
    ramp: Annotated[
        list[str] | None,
        _number("--ramp", "DAY:SHARE", "From that day on so much of the chips is there; begin at day 0. Repeatable."),
    ] = None,
    rollout_tokens: Annotated[
        float | None, _number("--rollout-tokens", "N", "Tokens of the mean answer in [rl]; else half of the most.")
    ] = None,
    requests_per_s: Annotated[
        float | None, _number("--requests-per-s", "N", "Requests to serve: the chips that takes, and how fast.")
    ] = None,
    prompt_tokens: Annotated[float, typer.Option("--prompt-tokens", metavar="N", help="Of a request.")] = 1000.0,
    answer_tokens: Annotated[float, typer.Option("--answer-tokens", metavar="N", help="Of a request.")] = 500.0,
    first_token_s: Annotated[
        float, typer.Option("--first-token-s", metavar="S", help="Promised wait for the first token, at P95.")
    ] = 2.0,
    token_s: Annotated[
        float, typer.Option("--token-s", metavar="S", help="Promised time from token to token.")
    ] = 0.05,
    switch_days: Annotated[
        float, typer.Option("--switch-days", metavar="N", help="From the decision for other chips to their first step.")
    ] = 14.0,
    switch_cost: Annotated[
        float, typer.Option("--switch-cost", metavar="MONEY", help="What that costs once.")
    ] = 0.0,
    delay_cost_per_day: Annotated[
        float, typer.Option("--delay-cost-per-day", metavar="MONEY", help="What a later end costs.")
    ] = 0.0,
    start_anew: Annotated[
        bool, typer.Option("--start-anew", help="A switch begins at step 0: the weights do not move.")
    ] = False,
    overrides: SetOption = None,
    json_path: Annotated[Path | None, _file("--json", _JSON_HELP)] = None,
    page: Annotated[Path | None, _file("--page", "Write the HTML page there.")] = None,
    explain: Annotated[
        str | None,
        _number("--explain", "KEY", "Show one part only, as in step.parts_s; without RECIPE, what it means."),
    ] = None,
) -> None:  # fmt: skip
    """Say memory, layout, step time, goodput, cost and date of every stage of a run on a cluster."""
    from crosschip.plan.whole_run import Asked, Switch
    from crosschip.recipe import load_recipe

    _refuse_without_effect(context)
    resolved = load_recipe(recipe, overrides)
    where, soak, notes = _where(cluster, report, blackout, ramp)
    asked = Asked(
        start=_start(start, by), by=_day(by, "--by"),
        choices=_choices(rollout_cluster, join_cluster, rollout_tokens),
        serve_on=None if serve_cluster is None else _read(serve_cluster),
        load=_load(requests_per_s, prompt_tokens, answer_tokens, first_token_s, token_s),
        compared=tuple(_read(path) for path in compare_cluster or []),
        switch=Switch(switch_days, switch_cost, delay_cost_per_day, portable=not start_anew), soak=soak,
    )  # fmt: skip
    document = _planned(resolved, where, asked, notes)
    _give(document, json_path, page, explain)


def _planned(recipe: Recipe, where: Cluster, asked: Asked, notes: list[str]) -> dict[str, Any]:
    from rich.console import Console

    from crosschip.plan.document import plan_document
    from crosschip.plan.whole_run import plan_whole_run

    with Console(stderr=True).status(f"planning {len(recipe.stages)} stages on {where.name}"):  # quiet in a pipe
        return plan_document(plan_whole_run(recipe, where, asked), tuple(notes))


def _give(document: dict[str, Any], json_path: Path | None, page: Path | None, explain: str | None) -> None:
    from crosschip.plan.document import explain as explained
    from crosschip.plan.page import plan_page
    from crosschip.plan.table import print_plan
    from crosschip.rundir import write_json, write_text

    if json_path is not None:
        write_json(json_path, document)
    if page is not None:
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
