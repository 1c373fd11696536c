"""Rejection sampling between two stages of a run: the model as it is by then makes the data of a later stage."""

from __future__ import annotations

from pathlib import Path

from crosschip.data import ChatTokenizer
from crosschip.errors import RecipeError
from crosschip.recipe import FurtherDistilling, Recipe
from crosschip.rundir import RunDirectory
from crosschip.train.distill import distill, manifest_path, training_problems
from crosschip.train.group.world import World
from crosschip.train.progress import StageProgress

__all__ = ["distil_stage"]


def distil_stage(
    name: str,
    settings: FurtherDistilling,
    model: Path | None,
    recipe: Recipe,
    run: RunDirectory,
    tokenizer: ChatTokenizer,
    world: World,
    progress: StageProgress,
) -> bool:
    """Write the rows on rank 0, unless they are there; whether anything was done.

    Raises:
        RecipeError: there is no model yet.
        DataError: no answer could be kept.
    """
    if model is None:
        raise RecipeError(f"{name} has no model to distil", "put a stage that trains before it")
    out = run.distilled(name)

    def make() -> bool:
        if manifest_path(out).exists():
            return False
        progress.say(f"{name}: right answers of {model}")
        problems = training_problems(settings, (recipe.rl.data if recipe.rl else None) or recipe.data, recipe.seed)
        distill(
            model,
            tokenizer,
            problems,
            settings,
            out,
            lambda line: progress.say(f"{name}: {line}"),
            seed=recipe.seed,
            chip=recipe.chips.serve,
            force=True,
        )
        return True

    return world.from_rank_zero(make)
