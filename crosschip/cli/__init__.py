"""The command line. Nothing is computed here: each verb reads its options, imports its room and calls it.

Rooms are imported inside the verbs, so that `--help` answers at once and without torch.
"""

from __future__ import annotations

import io
import sys
from typing import Annotated

import typer

from crosschip import __version__
from crosschip.cli.distilling import distill
from crosschip.cli.drilling import drill
from crosschip.cli.evaluating import evaluate
from crosschip.cli.examining import compare, doctor
from crosschip.cli.golden import golden
from crosschip.cli.guard import guarded
from crosschip.cli.handing import handoff
from crosschip.cli.making import run, train
from crosschip.cli.planning import plan, plan_app, validate
from crosschip.cli.qualifying import qualify
from crosschip.cli.serving import chat, serve

__all__ = ["app", "main"]

app = typer.Typer(
    name="crosschip",
    help="Train a reasoning model on one vendor's chips, serve it on another's, and prove every step.",
    epilog="Exit codes: 0 done, 1 an examination failed, 2 bad usage, 3 inconclusive, 4 a defect of crosschip.",
    rich_markup_mode=None,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"crosschip {__version__}")
        raise typer.Exit


@app.callback()
def crosschip(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Hold the options that stand before a verb."""


for verb in (run, qualify, train, evaluate, distill, drill, serve, compare, chat, doctor):
    app.command()(guarded(verb))
app.add_typer(handoff, name="handoff")
app.add_typer(golden, name="golden")
plan_app.command("run")(guarded(plan))
plan_app.command("validate")(guarded(validate))
app.add_typer(plan_app, name="plan")


def main() -> None:
    """Run the command line; `python -m crosschip` and the `crosschip` script both come here."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # A locale without a character that is to be shown (a narrow space, a Greek letter) must not end the work.
            stream.reconfigure(errors="backslashreplace")
    app()
