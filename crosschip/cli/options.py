"""Options and arguments that several verbs share, and what they mean for a recipe.

Each says its name: some releases of typer take a metavar for the name otherwise (`--CHIP`, seen with 0.27).
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

__all__ = [
    "ChipOption",
    "ExaminedChipOption",
    "HostOption",
    "OutOption",
    "PortOption",
    "RecipeArgument",
    "SetOption",
    "SkipBadRowsOption",
    "overrides_of",
]

RecipeArgument = Annotated[Path, typer.Argument(metavar="RECIPE", help="The TOML file that describes the run.")]
OutOption = Annotated[
    Path | None,
    typer.Option("--out", metavar="DIR", help="The run directory; runs/NAME if not given.", show_default=False),
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a key of the recipe, as in train.steps=200. Repeatable."),
]
SkipBadRowsOption = Annotated[
    int | None,
    typer.Option(
        "--skip-bad-rows",
        min=0,
        metavar="N",
        help="Leave out up to N rows of data that cannot be read; they are counted.",
    ),
]
HostOption = Annotated[str, typer.Option("--host", help="The address to listen on; 0.0.0.0 lets other machines in.")]
PortOption = Annotated[int, typer.Option("--port", min=0, max=65535, help="The port to listen on.")]
ChipOption = Annotated[
    str, typer.Option("--chip", metavar="CHIP", help="auto, cpu, or a torch device such as cuda:1 or npu.")
]

ExaminedChipOption = Annotated[
    str,
    typer.Option(
        "--chip",
        metavar="CHIP",
        help="auto, cpu, a torch device such as npu:0, or a simulated chip such as sim:N1,limit=512.",
    ),
]


def overrides_of(recipe: Path, overrides: list[str] | None, skip_bad_rows: int | None) -> list[str]:
    """What `--set` says, and `--skip-bad-rows` written as settings of every data table that the recipe has."""
    if skip_bad_rows is None:
        return overrides or []
    from crosschip.recipe import load_recipe

    resolved = load_recipe(recipe, overrides)
    stages = {"train": resolved.train, "sft": resolved.sft, "rl": resolved.rl}
    tables = ["data", *(f"{name}.data" for name, stage in stages.items() if stage is not None and stage.data)]
    return [*(overrides or []), *(f"{table}.skip_bad_rows={skip_bad_rows}" for table in tables)]
