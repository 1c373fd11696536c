"""Problems that a recipe wants asked, looked at before anything is trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from crosschip.data import arithmetic
from crosschip.errors import DataError
from crosschip.recipe import Recipe
from crosschip.rundir import RunDirectory
from crosschip.train.evaluate.of_recipe import check_problems
from crosschip.train.stages import train_recipe
from crosschip.voyage import run_voyage

MISSING = {"path": "nowhere/rows.jsonl"}


def recipe_of(**tables: Any) -> Recipe:
    whole = {"name": "n", "data": {"source": "arithmetic"}, "train": {"steps": 30, "batch_size": 2, "seq_len": 64}}
    return Recipe.model_validate(whole | tables)


def distilling(**keys: Any) -> list[dict[str, Any]]:
    return [{"kind": "distill", "name": "own", **keys}]


@pytest.mark.parametrize(
    ("tables", "told"),
    [
        ({"evaluate": {"level": 99}}, "evaluate: arithmetic level 99 does not exist"),
        ({"evaluate": {"num_problems": 20}}, "evaluate: 20 distinct held-out problems of level 1"),
        ({"evaluate": {"data": MISSING}}, "evaluate: .*nowhere/rows.jsonl.* does not exist"),
        ({"then": distilling(levels=[1, 99])}, "own: arithmetic level 99 does not exist"),
        ({"then": distilling(data={"source": "arithmetic", "levels": [99]})}, "own: .*names no known levels"),
        ({"then": distilling(data=MISSING)}, "own: .*nowhere/rows.jsonl.* does not exist"),
    ],
)
def test_problems_that_there_are_not_are_refused_with_their_table(
    tables: dict[str, Any], told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(arithmetic, "_MAX_TRIES_WITHOUT_A_NEW_ONE", 1)
    with pytest.raises(DataError, match=told):
        check_problems(recipe_of(**tables))


def test_problems_that_there_are_pass(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"question": "2 + 3?", "answer": "5"}) + "\n")
    files = {"path": str(path)}
    check_problems(recipe_of())
    check_problems(recipe_of(evaluate={"level": 2, "num_problems": 20}, then=distilling(levels=[1, 2])))
    check_problems(recipe_of(evaluate={"level": 99, "data": files}, then=distilling(data=files)))


def test_trainings_and_voyages_refuse_them_before_anything_is_made(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="evaluate: arithmetic level 99"):
        train_recipe(recipe_of(evaluate={"level": 99}), RunDirectory(tmp_path / "run"))
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        'name = "n"\n[data]\nsource = "arithmetic"\n[train]\nsteps = 30\nbatch_size = 2\nseq_len = 64\n'
        "[evaluate]\nlevel = 99\n"
    )
    with pytest.raises(DataError, match="evaluate: arithmetic level 99"):
        run_voyage(recipe, tmp_path / "run")
    assert not (tmp_path / "run").exists()
