"""Rejection sampling between two stages of a run: the model as it is by then makes the data of a later stage."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from crosschip.data import ChatTokenizer
from crosschip.errors import CheckpointError, RecipeError
from crosschip.recipe import FurtherDistilling, Recipe
from crosschip.rundir import RunDirectory, read_json, sha256_of
from crosschip.train.distill import asked_for, distill, manifest_path, training_problems
from crosschip.train.evaluate import time_limit_s, weights_sha256
from crosschip.train.group.waiting import made_by_rank_zero
from crosschip.train.guard.allowances import START
from crosschip.train.identity import differing_fields
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
        CheckpointError: the rows are there, and another model or other settings wrote them, or somebody changed them.
        DataError: no answer could be kept.
    """
    if model is None:
        raise RecipeError(f"{name} has no model to distil", "put a stage that trains before it")
    out = run.distilled(name)

    def beat() -> None:
        rank.heartbeat.beat(START, 0)

    def tell(line: str) -> None:
        beat()
        rank.progress.say(f"{name}: {line}")

    def make() -> bool:
        is_there = out.exists() and manifest_path(out).exists()
        manifest = read_json(manifest_path(out)) if is_there else {}
        if is_there:
            _check_rows(name, out, model, manifest, beat)
        problems = training_problems(settings, (recipe.rl.data if recipe.rl else None) or recipe.data, recipe.seed)
        if is_there:
            _check_settings(name, out, settings, asked_for(problems, settings, recipe.seed), manifest)
            return False
        tell(f"right answers of {model}")
        distill(
            model,
            tokenizer,
            problems,
            settings,
            out,
            tell,
            seed=recipe.seed,
            chip=rank.chip.name,  # a process that trains on one chip may not be able to open another beside it
            beat=beat,
            force=True,
            checker_timeout_s=time_limit_s(recipe),
        )
        return True

    return made_by_rank_zero(rank.world, rank.heartbeat, make)


def _check_rows(name: str, out: Path, model: Path, manifest: Any, beat: Callable[[], None]) -> None:
    """Refuse rows that are not those that were written, or that another model wrote than would write them now."""
    if not isinstance(manifest, dict) or (manifest.get("rows") or {}).get("sha256") != sha256_of(out):
        problem = f"{name}: the rows in {out} are not those that {manifest_path(out).name} speaks of"
        raise CheckpointError(problem, _again(out))
    wrote = manifest.get("model") or {}
    if wrote.get("weights_sha256") not in (None, weights_sha256(model, beat)):
        raise CheckpointError(
            f"{name}: the rows in {out} were written by {wrote.get('directory')}, with other weights than {model} has",
            f"{_again(out)}; or set the stages before back to go on as it was",
        )


def _check_settings(
    name: str, out: Path, settings: FurtherDistilling, asked: dict[str, Any], manifest: dict[str, Any]
) -> None:
    """Refuse rows that were asked for, or chosen, in another way than they would be now."""
    wanted = {**asked, "keep": settings.keep, "choose": settings.choose}
    differing = list(differing_fields({key: manifest.get(key) for key in wanted}, wanted, name))
    if differing:
        raise CheckpointError(
            f"{name}: the rows in {out} were written with other settings: {'; '.join(differing)}",
            f"{_again(out)}; or set {name} back to go on as it was",
        )


def _again(out: Path) -> str:
    return (
        f"delete {out} and {manifest_path(out).name} beside it to write them again, and the directories of the stages "
        "that train on them"
    )
