"""The verbs that make a model: run, train, handoff, plan."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from crosschip.cli.options import (
    HostOption,
    OutOption,
    PortOption,
    RecipeArgument,
    SetOption,
    SkipBadRowsOption,
    overrides_of,
)
from crosschip.errors import NotBuiltYet

__all__ = ["handoff", "plan", "run", "train"]


def run(
    recipe: RecipeArgument,
    out: OutOption = None,
    overrides: SetOption = None,
    skip_bad_rows: SkipBadRowsOption = None,
    serve: Annotated[bool, typer.Option("--serve", help="Stay up at the end and serve the model.")] = False,
    host: HostOption = "127.0.0.1",
    port: PortOption = 8000,
) -> None:
    """The whole voyage of a recipe on this machine: train, evaluate, hand off, compare, and show how to chat."""
    from crosschip.voyage import run_voyage

    settings = overrides_of(recipe, overrides, skip_bad_rows)
    run_voyage(recipe, out=out, overrides=settings, serve=serve, host=host, port=port)


def plan(
    recipe: RecipeArgument,
    cluster: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="The cluster: chips, nodes, network, price.", show_default=False),
    ] = None,
    report: Annotated[
        Path | None, typer.Option(metavar="FILE", help="A report of `qualify`, for measured rates.", show_default=False)
    ] = None,
    by: Annotated[
        str | None, typer.Option(metavar="YYYY-MM-DD", help="The date it must be ready by.", show_default=False)
    ] = None,
) -> None:
    """Say memory, layout, step time, goodput, cost and date of a run on a cluster (not built yet)."""
    raise NotBuiltYet(
        f"`crosschip plan` is not built yet: nothing was computed for {recipe} on {cluster or 'no cluster'}, "
        f"with {report or 'no report'}, by {by or 'no date'}",
        "measure a short run with `crosschip train` on one machine of that cluster",
    )


def train(
    recipe: RecipeArgument,
    out: OutOption = None,
    overrides: SetOption = None,
    skip_bad_rows: SkipBadRowsOption = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last complete checkpoint.")] = False,
) -> None:
    """Train what the recipe says: pre-training, then fine-tuning; checkpoints and metrics in the run directory."""
    from crosschip.recipe import load_recipe
    from crosschip.rundir import RunDirectory, write_text

    settings = overrides_of(recipe, overrides, skip_bad_rows)
    resolved = load_recipe(recipe, settings)
    from crosschip.train import train_recipe  # takes seconds: a recipe's fault is told before

    run = RunDirectory(out or Path("runs") / resolved.name)
    if not resume and not (run.path / "train").exists():
        write_text(run.recipe, recipe.read_text(encoding="utf-8"))
    again = ["crosschip", "train", str(recipe), "--out", str(run.path)]
    again += [*(part for setting in settings for part in ("--set", setting)), "--resume"]
    outcome = train_recipe(resolved, run, resume=resume, resume_command=shlex.join(again))
    raise typer.Exit(outcome.exit_code)


def handoff(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run directory with a trained model.")],
    to: Annotated[str, typer.Option("--to", metavar="TARGET", help="The form to hand off: hf (Hugging Face).")],
) -> None:
    """Write the model files of a run for a target engine."""
    from crosschip.recipe import parse_recipe
    from crosschip.rundir import RunDirectory, read_json

    directory = RunDirectory(run)
    recipe = parse_recipe(read_json(directory.resolved_recipe), str(directory.resolved_recipe))
    if to != "hf":
        raise NotBuiltYet(f"--to {to!r} is not a target that is built yet", "use --to hf, which most engines read")
    from crosschip.handoff import export_hf

    with directory.lock():
        export_hf(directory, recipe, directory.handoff(to))
    print(f"{directory.handoff(to)}\nserve it with: crosschip serve {shlex.quote(str(directory.handoff(to)))}")
