"""The verb that rehearses faults in a running training: drill."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from crosschip.cli.options import OutOption, RecipeArgument, SetOption
from crosschip.cli.reports import output_place
from crosschip.errors import EXIT_FAIL, EXIT_INCONCLUSIVE, EXIT_OK, RecipeError, RunDirectoryError

if TYPE_CHECKING:
    from crosschip.recipe import Recipe

__all__ = ["drill"]

# The training shall outlast the drill, be restarted as often as it is struck, and not wait long where nothing is known;
# saves shall come soon, for the faults that strike in one.
_CHECKPOINT_EVERY = 20
_FOR_A_DRILL = (
    "train.steps=1000000",
    f"train.checkpoint_every={_CHECKPOINT_EVERY}",
    "guard.max_restarts=1000",
    "guard.max_transient_faults=1000",
    "guard.max_roll_backs=1000",
    "guard.start_allowance_s=120",
)


def drill(
    recipe: RecipeArgument,
    out: OutOption = None,
    overrides: SetOption = None,
    minutes: Annotated[float, typer.Option("--minutes", min=0.1, help="How long faults strike.")] = 10.0,
    mtbf: Annotated[float, typer.Option("--mtbf", min=1.0, help="Mean seconds between two faults.")] = 60.0,
    faults: Annotated[
        str | None,
        typer.Option("--faults", metavar="A,B", help="Only these; none for a clean run.", show_default=False),
    ] = None,
    nproc: Annotated[int, typer.Option("--nproc", min=1, metavar="N", help="Processes of each group.")] = 1,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of when which fault strikes whom.")] = 0,
    json_path: Annotated[
        Path | None,
        typer.Option(
            "--json", metavar="FILE", help="The report; else drill.json in the run directory.", show_default=False
        ),
    ] = None,
) -> None:
    """Plant faults into a running training, and see whether each is noticed and survived.

    Exit codes: 0 all faults noticed and no false alarm, 1 not so or the training ended before the drill did, 2 a named
    fault could not be noticed by such a training, 3 no fault was planted.
    """
    from crosschip.recipe import load_recipe
    from crosschip.train.drill.drill import DrillPlan, run_drill
    from crosschip.train.saying import say

    output_place(json_path, "the report", "--json", [recipe])
    settings = _settings_of(recipe, overrides or [])
    resolved = load_recipe(recipe, settings)
    assert resolved.train is not None
    directory = out or Path("runs") / f"{resolved.name}-drill"
    if directory.exists():
        raise RunDirectoryError(
            f"{directory} is there already", "give another --out, or delete it: a drill begins anew"
        )
    names = _fault_names(faults, resolved)
    command = [sys.executable, "-m", "crosschip", "train", str(recipe), "--out", str(directory), "--nproc", str(nproc)]
    plan = DrillPlan(
        [*command, *(part for setting in settings for part in ("--set", setting))],
        directory,
        "pretrain",
        resolved.groups.num_groups,
        nproc,
        names,
        mtbf,
        60.0 * minutes,
        seed,
        checkpoint_every=resolved.train.checkpoint_every,
    )
    report = run_drill(plan, lambda line: say(f"crosschip: {line}"))
    _tell(report, {"recipe": recipe.name, "settings": settings}, directory, json_path or directory / "drill.json")
    raise typer.Exit(_exit_code(report, names == []))


def _fault_names(faults: str | None, recipe: Recipe) -> list[str] | None:
    """The faults named on the command line; None for all that can be noticed.

    Raises:
        RecipeError: one is no fault, or could not be noticed whatever happens.
    """
    from crosschip.train.drill.catalogue import FAULTS, Layout, chosen

    if faults is None:
        return None
    names = [name for name in faults.split(",") if name not in ("", "none")]
    if unknown := [name for name in names if name not in FAULTS]:
        raise RecipeError(f"--faults {unknown[0]!r} is no fault of the drill", f"choose among {', '.join(FAULTS)}")
    chosen(names, Layout(recipe.groups.num_groups, _averages_each_step(recipe)))
    return names


def _averages_each_step(recipe: Recipe) -> bool | None:
    """Whether the groups will; None where they choose by the link and the time of a step, once they train."""
    from crosschip.thin_links import link_from

    mode = recipe.groups.mode
    return None if mode == "auto" and link_from(recipe.links) is not None else mode != "diloco"


def _settings_of(recipe: Path, overrides: list[str]) -> list[str]:
    """The overrides of a drill, those of the user last.

    `keep_every` is raised where it would not fit the drill's checkpoints.

    Raises:
        RecipeError: nothing is pre-trained.
    """
    from crosschip.recipe import load_recipe

    stage = load_recipe(recipe, overrides).train
    if stage is None:
        raise RecipeError(f"{recipe} has no [train] stage to drill", "add one")
    settings = [*_FOR_A_DRILL, *overrides]
    is_given = any(override.partition("=")[0].strip() == "train.checkpoint_every" for override in overrides)
    every = stage.checkpoint_every if is_given else _CHECKPOINT_EVERY
    if stage.keep_every is not None and stage.keep_every % every:
        settings.append(f"train.keep_every={-(-stage.keep_every // every) * every}")
    return settings


def _tell(report: dict[str, Any], about: dict[str, Any], directory: Path, path: Path) -> None:
    """Print what was seen, and write it down.

    Raises:
        KeyboardInterrupt: the drill was interrupted.
    """
    from crosschip.report.drill_table import print_drill
    from crosschip.rundir import write_json

    write_json(path, {**about, **report})
    print_drill(report)
    print(f"\nreport: {path}")
    if report["interrupted"]:
        raise KeyboardInterrupt
    if report["ended_early"]:
        print(_early_end(report, directory), file=sys.stderr)


def _early_end(report: dict[str, Any], directory: Path) -> str:
    return (
        f"crosschip: the training ended with exit code {report['exit_code']} after {report['duration_s']:.0f} s, "
        f"before the drill asked it to: what was seen is no drill of that length\n"
        f"  what to do: see {directory / 'drill.log'}; give it more train.steps where it has finished, else mend what "
        "it says there"
    )


def _exit_code(report: dict[str, Any], is_clean: bool) -> int:
    if report["ended_early"] or report["false_alarms"] or not all(row["detected"] for row in report["faults"]):
        return EXIT_FAIL
    return EXIT_OK if report["faults"] or is_clean else EXIT_INCONCLUSIVE
