"""The ways of `benchmarks/two_chips.py` differ in nothing but where rollouts come from, and what is corrected."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

from crosschip.recipe import load_recipe

ROOT = Path(__file__).parents[3]


def test_all_ways_train_on_one_chip_and_compute_in_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    two_chips = importlib.import_module("two_chips")
    recipes = [load_recipe(ROOT / "recipes/two-chips.toml", list(way)) for way in two_chips.ways("sim:noisy").values()]
    reinforced = [recipe.rl for recipe in recipes if recipe.rl is not None]
    assert [(rl.dtype, rl.rollouts.dtype) for rl in reinforced] == [("bfloat16", "bfloat16")] * 3
    assert {(recipe.chips.train, recipe.chips.serve) for recipe in recipes} == {("cpu", "cpu")}
    assert [rl.rollouts.engines for rl in reinforced] == [["native"], ["native@sim:noisy"], ["native@sim:noisy"]]
