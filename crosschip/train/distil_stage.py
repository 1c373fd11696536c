"""Rejection sampling between two stages of a run: the model as it is by then makes the data of a later stage."""

from __future__ import annotations

from pathlib import Path

from crosschip.data import ChatTokenizer
from crosschip.errors import CheckpointError, RecipeError
from crosschip.recipe import FurtherDistilling, Recipe
from crosschip.rundir import RunDirectory, read_json
from crosschip.train.distill import distill, manifest_path, training_problems
from crosschip.train.evaluate import time_limit_s, weights_sha256
from crosschip.train.group.waiting import made_by_rank_zero
from crosschip.train.guard.allowances import START
from crosschip.train.stage_making import Rank

__all__ = ["distil_stage"]


def distil_stage(
    name: str,
    settings: FurtherDistilling,
    model: Path | None,
    recipe: Recipe,
    run: RunDirectory,
    tokenizer: ChatTokenizer,
    rank: Rank,
) -> bool:
    """Write the rows on rank 0, unless they are there; whether anything was done.

    Raises:
        RecipeError: there is no model yet.
        CheckpointError: the rows are there, and another model wrote them.
        DataError: no answer could be kept.
    """
    if model is None:
        raise RecipeError(f"{name} has no model to distil", "put a stage that trains before it")
    out = run.distilled(name)

    def tell(line: str) -> None:
        rank.heartbeat.beat(START, 0)
        rank.progress.say(f"{name}: {line}")

    def make() -> bool:
        if manifest_path(out).exists():
            _check_model(name, out, model)
            return False
        tell(f"right answers of {model}")
        problems = training_problems(settings, (recipe.rl.data if recipe.rl else None) or recipe.data, recipe.seed)
        distill(
            model,
            tokenizer,
            problems,
            settings,
            out,
            tell,
            seed=recipe.seed,
            chip=recipe.chips.serve,
            force=True,
            checker_timeout_s=time_limit_s(recipe),
        )
        return True

    return made_by_rank_zero(rank.world, rank.heartbeat, make)


def _check_model(name: str, out: Path, model: Path) -> None:
    """Refuse rows that another model wrote than the one that would write them now."""
    wrote = read_json(manifest_path(out)).get("model") or {}
    if wrote.get("weights_sha256") not in (None, weights_sha256(model)):
        raise CheckpointError(
            f"{name}: the rows in {out} were written by {wrote.get('directory')}, with other weights than {model} has",
            f"delete {out} and {manifest_path(out).name} beside it to write them again, and the directories of the "
            "stages that train on them; or set the stages before back to go on as it was",
        )
