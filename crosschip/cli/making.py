"""The verbs that make a model: run, train."""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

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
from crosschip.errors import RecipeError

if TYPE_CHECKING:
    from crosschip.train.launching import TrainCommand

__all__ = ["run", "train"]


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


def train(
    recipe: RecipeArgument,
    out: OutOption = None,
    overrides: SetOption = None,
    skip_bad_rows: SkipBadRowsOption = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last complete checkpoint.")] = False,
    nproc: Annotated[
        int, typer.Option("--nproc", min=1, metavar="N", help="Processes on this machine that train one model.")
    ] = 1,
    group: Annotated[
        int | None,
        typer.Option(
            "--group",
            min=0,
            metavar="K",
            help="Which of the recipe's replica groups to start here; all of them if not given.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Train what the recipe says: pre-training, then fine-tuning; checkpoints and metrics in the run directory.

    A process beside it watches: what hangs or dies is started again from the last checkpoint.
    """
    from crosschip.recipe import load_recipe
    from crosschip.rundir import RunDirectory
    from crosschip.train.group.layout import check_layout
    from crosschip.train.launching import TrainCommand, is_rank, train_from_outside

    settings = overrides_of(recipe, overrides, skip_bad_rows)
    resolved = load_recipe(recipe, settings)
    run = RunDirectory(out or Path("runs") / resolved.name)
    again = ["train", str(recipe), "--out", str(run.path)]
    again += [part for setting in settings for part in ("--set", setting)]
    command = TrainCommand(resolved, run, again, resume, nproc, group)
    if is_rank() and nproc > 1:
        raise RecipeError(
            f"--nproc {nproc} inside of a process that is a rank already",
            "leave out --nproc where torchrun, Slurm or another launcher starts the ranks",
        )
    if is_rank():
        raise typer.Exit(_train_as_rank(recipe, command))
    check_layout(resolved, nproc)
    raise typer.Exit(train_from_outside(command))


def _train_as_rank(recipe_file: Path, command: TrainCommand) -> int:
    """Train in this process, which a supervisor or a launcher has started; returns the exit code."""
    from crosschip.rundir import write_text
    from crosschip.train.group.launch import NUM_RANKS
    from crosschip.train.group.rank import as_rank
    from crosschip.train.guard.heartbeat import open_heartbeat
    from crosschip.train.guard.hook import GuardError
    from crosschip.train.launching import GO_ON_WITH

    run, resume = command.run, command.resume
    with as_rank() as rank:
        heartbeat = open_heartbeat(command.recipe.guard.start_allowance_s)
        from crosschip.train import train_recipe  # takes seconds: a recipe's fault is told before

        if rank == 0 and not resume and not (run.path / "train").exists():
            write_text(run.recipe, recipe_file.read_text(encoding="utf-8"))
        again = list(command.arguments)
        again += ["--nproc", os.environ[NUM_RANKS]] if NUM_RANKS in os.environ else []
        resume_command = os.environ.get(GO_ON_WITH) or shlex.join(["crosschip", *again, "--resume"])
        try:
            outcome = train_recipe(
                command.recipe,
                run,
                resume=resume,
                resume_command=resume_command,
                heartbeat=heartbeat,
                group=command.group,
            )
        except GuardError as error:
            heartbeat.leave(error.exit_code)  # a verdict: it is not started again
            raise
        heartbeat.leave(outcome.exit_code)
        return outcome.exit_code
