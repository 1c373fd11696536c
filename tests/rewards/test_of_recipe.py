"""Checkers that a recipe names, before anything is trained."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from crosschip.errors import RecipeError
from crosschip.recipe import Recipe
from crosschip.rewards.of_recipe import check_checkers
from crosschip.rundir import RunDirectory

RL = {"steps": 5, "prompts": 2, "samples": 2, "seq_len": 64, "max_new_tokens": 16}


def recipe_of(**tables: Any) -> Recipe:
    whole = {"name": "n", "data": {"source": "arithmetic"}, "train": {"steps": 30, "batch_size": 2, "seq_len": 64}}
    return Recipe.model_validate(whole | tables)


@pytest.mark.parametrize(
    ("tables", "key"),
    [
        ({"rl": RL | {"rewards": [{"checker": "math"}, {"checker": "maths"}]}}, "rl.rewards"),
        ({"then": [RL | {"kind": "rl", "name": "more", "rewards": [{"checker": "maths"}]}]}, "more.rewards"),
        ({"evaluate": {"checker": "maths"}}, "evaluate.checker"),
    ],
)
def test_a_name_that_no_checker_has_is_refused_with_its_key(tables: dict[str, Any], key: str) -> None:
    with pytest.raises(RecipeError, match=rf"{key}: the reward 'maths' does not exist") as raised:
        check_checkers(recipe_of(**tables))
    assert "package.module:function" in raised.value.remedy


def test_functions_of_ones_own_are_not_imported() -> None:
    name = "tests.rewards.broken_module:check"
    check_checkers(recipe_of(rl=RL | {"rewards": [{"checker": name}]}, evaluate={"checker": name}))
    assert "tests.rewards.broken_module" not in sys.modules


def test_trainings_and_voyages_refuse_it_before_anything_is_made(tmp_path: Path) -> None:
    from crosschip.train.stages import train_recipe
    from crosschip.voyage import run_voyage

    with pytest.raises(RecipeError, match=r"evaluate\.checker"):
        train_recipe(recipe_of(evaluate={"checker": "maths"}), RunDirectory(tmp_path / "run"))
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        'name = "n"\n[data]\nsource = "arithmetic"\n[train]\nsteps = 30\nbatch_size = 2\nseq_len = 64\n'
        '[evaluate]\nchecker = "maths"\n'
    )
    with pytest.raises(RecipeError, match=r"evaluate\.checker"):
        run_voyage(recipe, tmp_path / "run")
    assert not (tmp_path / "run").exists()
