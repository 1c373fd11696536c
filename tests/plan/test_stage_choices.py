"""What is done on other clusters: carried out as it was asked for, told where it cannot be, or refused."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

from crosschip.errors import RecipeError
from crosschip.plan.failures import PlanError
from crosschip.plan.serving import Load
from crosschip.plan.stages import StageChoices
from crosschip.plan.whole_run import Switch, WholeRun
from tests.plan.test_whole_run import FULL, PLAIN, cluster, planned, recipe

REINFORCED: dict[str, Any] = {
    "name": "small", "data": {"source": "arithmetic"},
    "rl": {"steps": 3000, "prompts": 64, "samples": 8, "seq_len": 512, "max_new_tokens": 400},
    "then": [{"kind": "rl", "name": "more-rl", "steps": 500, "seq_len": 256, "max_new_tokens": 200}],
}  # fmt: skip


@pytest.fixture(scope="module")
def run() -> WholeRun:
    return planned(cluster(num_chips=8), recipe(REINFORCED))


def test_a_cluster_that_learns_and_answers_does_so_in_turns(run: WholeRun) -> None:
    here, there = cluster(num_chips=8), cluster("H20", 16, "there")
    both = planned(here, recipe(REINFORCED), choices=StageChoices(rollouts_on=here))
    assert both.stages == run.stages
    compared = planned(
        here, recipe(REINFORCED), choices=StageChoices(rollouts_on=there), compared=(there,)
    ).others["there"]  # fmt: skip
    assert isinstance(compared, WholeRun)
    assert all(each.num_chips <= 16 and not each.beside for each in compared.stages)
    assert compared.stages == planned(there, recipe(REINFORCED)).stages


def test_clusters_are_told_apart_by_their_names() -> None:
    here = cluster(num_chips=8)
    other = cluster(num_chips=8, price={"per_chip_hour": 2.0})
    refused: tuple[dict[str, Any], ...] = (
        {"choices": StageChoices(rollouts_on=other)},
        {"compared": (other,)},
        {"compared": (cluster("H20", name="there"), cluster("H20", 8, "there"))},
        {"load": Load(50, 1000, 500), "serve_on": other},
    )
    for more in refused:
        with pytest.raises(RecipeError, match="two clusters that differ are called"):
            planned(here, recipe(REINFORCED), **more)
    with pytest.raises(RecipeError, match="here is joined to itself"):
        planned(here, choices=StageChoices(joined_with=(here,)))
    measured = replace(here, hardware=replace(here.hardware, efficiency=0.9))
    assert planned(measured, recipe(REINFORCED), compared=(here,)).others, "what a report adds makes no other cluster"


def test_the_mean_answer_is_what_was_given_or_the_plan_says_so(run: WholeRun) -> None:
    for tokens in (math.nan, math.inf, 0.0, -5.0):
        with pytest.raises(PlanError, match="--rollout-tokens is"):
            StageChoices(answer_tokens=tokens)
    long = planned(cluster(num_chips=8), recipe(REINFORCED), choices=StageChoices(answer_tokens=300.0))
    notes = {each.name: " ".join(each.notes) for each in long.stages}
    assert "200 at most" in notes["more-rl"]
    assert "not with 300" in notes["more-rl"]
    assert "at most" not in notes["rl"]
    assert not any("--rollout-tokens)" in note for each in run.stages for note in each.notes)


def test_choices_that_no_stage_carries_out_are_refused() -> None:
    there = cluster("H20", 64, "there")
    for choices in (StageChoices(rollouts_on=there), StageChoices(answer_tokens=100.0)):
        with pytest.raises(RecipeError, match="no stage of the recipe makes rollouts"):
            planned(of=recipe(PLAIN), choices=choices)
    with pytest.raises(RecipeError, match="no stage of the recipe trains in groups"):
        planned(of=recipe(REINFORCED), choices=StageChoices(joined_with=(there,)))
    with pytest.raises(PlanError, match="switch_days is nan"):
        Switch(days=math.nan)


def test_groups_within_a_cluster_end_where_answers_begin_and_one_goes_on_with_its_own_chips() -> None:
    of_groups = {"groups": {"num_groups": 2}, "links": {"bandwidth_mbit_s": 1e5}}
    stages = planned(cluster(num_chips=8), recipe(FULL, **of_groups)).stages
    found = [(each.name, each.num_chips, each.num_groups) for each in stages]
    assert found == [("pretrain", 8, 2), ("sft", 8, 2), ("rl", 4, 1), ("polish", 4, 1), ("more-rl", 4, 1)]
    alone = planned(cluster(num_chips=4), recipe(FULL)).stages
    assert [each.work_s for each in stages[2:]] == [each.work_s for each in alone[2:]]
